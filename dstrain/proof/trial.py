"""A short training of the user's own recipe through the real `dstrain run`, and what can befall it on the way."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dstrain.base.devices import count_devices
from dstrain.base.environment import for_child
from dstrain.base.processes import Process, start
from dstrain.checkpoint.manifest import MANIFEST, checkpoint_folder
from dstrain.data.ledger import LEDGER_NAME, read_ledger
from dstrain.errors import UserError
from dstrain.plan.schedule import warmup_steps
from dstrain.recipe.phases import Phase
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.recipe.training import PhaseSchedule, Schedule
from dstrain.rundir.run_folder import attempt_folder, next_attempt

POLL_SECONDS = 0.002  # steps of tiny models take hardly longer
LOG_LINES_SHOWN = 12
KEEP_ALL = 1_000_000


class TrialError(UserError):
    """A trial run did not do what it was to do. The message ends with the last lines of its output."""


def trial_recipe(recipe: Recipe, steps: int, save_every: int, *, dropout: bool = True) -> Recipe:
    """The recipe cut short: `steps` steps, saved every `save_every`, each one logged, nothing evaluated.

    Checkpoints go into the trial's folder, wherever the recipe has them. Phases share the steps, so that a trial comes
    through all of them. A warm-up longer than half of the steps is shortened, or the weights would hardly move.
    """
    saving = {"every_steps": save_every, "keep_last": KEEP_ALL, "storage": None}
    changes: dict[str, object] = {
        "train": recipe.train.model_copy(update={"steps": steps, "tokens": None, "epochs": None}),
        "schedule": _shortened(recipe.schedule, steps),
        "checkpoint": recipe.checkpoint.model_copy(update=saving),
        "evaluate": recipe.evaluate.model_copy(update={"every_steps": None}),
        "log": recipe.log.model_copy(update={"every_steps": 1, "tensorboard": False}),
    }
    if isinstance(recipe, PretrainingRecipe):
        data: dict[str, object] = {"valid": None, "lanes": recipe.lanes}
        if recipe.data.sources is not None:
            sources = recipe.data.sources.items()
            data["sources"] = {name: source.model_copy(update={"valid": None}) for name, source in sources}
        changes["data"] = recipe.data.model_copy(update=data)
        if recipe.phases:
            changes["train"] = recipe.train
            changes["phases"] = _shared_steps(recipe.phases, steps)
    if not dropout and recipe.model.config is not None:
        config = recipe.model.config.model_copy(update=dict.fromkeys(dropout_rates(recipe), 0.0))
        changes["model"] = recipe.model.model_copy(update={"config": config})
    return recipe.model_copy(update=changes)


Scheduled = TypeVar("Scheduled", PhaseSchedule, Schedule)


def _shortened(schedule: Scheduled, steps: int) -> Scheduled:
    if warmup_steps(Schedule(**schedule.model_dump()), steps) <= steps // 2:
        return schedule
    return schedule.model_copy(update={"warmup_steps": steps // 4, "warmup_fraction": None})


def _shared_steps(phases: Sequence[Phase], steps: int) -> tuple[Phase, ...]:
    """The phases with about as many steps each; where there are more of them than steps, the first ones."""
    phases = phases[:steps]
    ends = [steps * (number + 1) // len(phases) for number in range(len(phases))]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(
        phase.model_copy(
            update={
                "steps": length,
                "tokens": None,
                "schedule": None if phase.schedule is None else _shortened(phase.schedule, length),
            }
        )
        for phase, length in zip(phases, lengths, strict=True)
    )


def dropout_rates(recipe: Recipe) -> dict[str, float]:
    """The dropout rates of a recipe's model that are not 0."""
    if recipe.model.config is not None:
        values = recipe.model.config.model_dump()
    else:
        assert recipe.model.pretrained is not None
        values = json.loads((Path(recipe.model.pretrained) / "config.json").read_text())
    return {name: rate for name, rate in values.items() if "dropout" in name and isinstance(rate, float) and rate > 0}


@dataclass
class Trial:
    """One trial: a recipe, its run folder, and the command that runs there now."""

    recipe: Recipe
    run_dir: Path
    entry: str | None = None  # what ranks call instead of training
    joins: Path | None = None  # a control group
    process: Process | None = None

    def start(self, ranks: int, overrides: Sequence[str] = ()) -> None:
        """Start `dstrain run`, or start it again. Ranks have a device each, or all are on the CPU."""
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        recipe_file = self.run_dir.with_suffix(".yaml")
        recipe_file.write_text(resolved_yaml(self.recipe))
        command = [sys.executable, "-m", "dstrain", "run", str(recipe_file), *overrides]
        command += ["--procs-per-node", str(ranks), "--run-dir", str(self.run_dir)]
        command += [] if self.entry is None else ["--entry", self.entry]
        if self.joins is not None:
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.joins / "cgroup.procs"), *command]
        hidden = {} if count_devices() >= ranks else {"CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("ab") as log:
            self.process = start(command, environment=for_child(hidden), output=log)

    def finish(self, *, expected: int) -> None:
        """Wait for the command to end. Raises TrialError if its exit code is another one."""
        assert self.process is not None
        code = self.process.wait()
        if code != expected:
            raise TrialError(
                f"{self.run_dir.name}: `dstrain run` ended with exit code {code}, not {expected}{self.end_of_log}"
            )

    def wait_for_step(self, saved: int, step: int) -> int:
        """Wait until the checkpoint of step `saved` is committed and step `step` is made; returns the newest step.

        Raises:
            TrialError: the run ended before.
        """
        assert self.process is not None
        ledger, manifest = self.run_dir / LEDGER_NAME, checkpoint_folder(self.run_dir, saved) / MANIFEST
        while True:
            ended = self.process.poll() is not None
            if manifest.exists() and (newest := next(read_ledger(ledger), None)) and newest.step >= step:
                return newest.step
            if ended:
                raise TrialError(f"{self.run_dir.name}: the run ended before step {step}{self.end_of_log}")
            time.sleep(POLL_SECONDS)

    def newest_step(self) -> int:
        """The newest step that was made; 0 before the first."""
        ledger = self.run_dir / LEDGER_NAME
        return next((entry.step for entry in read_ledger(ledger)), 0) if ledger.exists() else 0

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank of the newest attempt."""
        os.kill(self.rank_pid(rank), number)

    def rank_pid(self, rank: int) -> int:
        """The process id of a rank of the newest attempt."""
        folder = attempt_folder(self.run_dir, self.attempts)
        pid: int = json.loads((folder / "ranks" / f"rank-{rank:05d}.json").read_text())["pid"]
        return pid

    def stop(self) -> None:
        """Ask the run to stop, as SLURM or a person would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Leave no process behind: the kernel ends the ranks with the command."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def attempts(self) -> int:
        """How many attempts there were."""
        return next_attempt(self.run_dir) - 1

    @property
    def log(self) -> Path:
        """What the command printed, over all starts."""
        return self.run_dir.with_suffix(".log")

    @property
    def end_of_log(self) -> str:
        """Its last lines, for messages."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return ":\n" + "\n".join(f"  | {line}" for line in lines)
