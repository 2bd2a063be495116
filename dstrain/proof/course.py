"""A run that faults happen to, one after another: its folder, the command that runs there, and what is seen of it."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.phases import RankPhase
from dstrain.checkpoint.manifest import MANIFEST, checkpoint_folder, committed
from dstrain.diagnose.verdict import VERDICT_FILE, Verdict
from dstrain.plan import corpus_tokens, make_timeline
from dstrain.proof.fault_entry import ENTRY, Order, Orders
from dstrain.proof.memory_group import MemoryGroup
from dstrain.proof.trial import Trial, TrialError
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.rundir.run_folder import attempt_folder, newest_checkpoint_step

POLL_SECONDS = 0.01


@dataclass
class Course:
    """One such run, and what the machine allows for it."""

    recipe: Recipe
    run_dir: Path
    ranks: int
    group: MemoryGroup | None
    private_mounts: bool
    step_seconds: float
    patience_seconds: float
    overrides: tuple[str, ...] = ()
    injected_unix: float = 0.0
    damaged: tuple[Path, Path] | None = None  # a shard, and what it should be
    trial: Trial = field(init=False)

    def __post_init__(self) -> None:
        joins = None if self.group is None else self.group.folder
        self.trial = Trial(self.recipe, self.run_dir, ENTRY, joins)

    @property
    def rank(self) -> int:
        """The chosen one: the last."""
        return self.ranks - 1

    @property
    def steps(self) -> int:
        """How many it has."""
        timeline = make_timeline(self.recipe, corpus_tokens(self.recipe))
        assert timeline is not None, "a trial has a number of steps"
        return timeline.total_steps

    @property
    def reads_shards(self) -> bool:
        """Whether there is a corpus."""
        return isinstance(self.recipe, PretrainingRecipe)

    @property
    def masked_lm_recipe(self) -> PretrainingRecipe:
        """The recipe, of a task that reads shards."""
        assert isinstance(self.recipe, PretrainingRecipe)
        return self.recipe

    def start(self) -> None:
        """Give the command, or give it again."""
        self._orders().write(self.run_dir)
        self.trial.start(self.ranks, self.overrides)

    def order(self, happening: str, phase: RankPhase, rank: int | None) -> None:
        """Have something happen in the present attempt."""
        order = Order(happening, rank, self.trial.attempts, self.newest_step() + 1, phase)
        self._orders(order).write(self.run_dir)

    def fired(self) -> float:
        """When what was ordered happened."""
        file = self.run_dir / "drill" / "fired.json"
        time_unix: float = json.loads(file.read_text())["time_unix"] if file.exists() else 0.0
        return time_unix

    def _orders(self, order: Order | None = None) -> Orders:
        return Orders(self.step_seconds, self.private_mounts, order)

    # ------------------------------------------------------------ what is seen

    @property
    def running(self) -> bool:
        """Whether the command runs."""
        return self.trial.process is not None and self.trial.process.poll() is None

    def newest_step(self) -> int:
        """The newest step that was made, also by an earlier attempt."""
        return self.trial.newest_step()

    def saved_steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(int(folder.name.removeprefix("step-")) for folder in committed(self.run_dir))

    def newest_checkpoint(self) -> Path:
        """Its folder."""
        step = newest_checkpoint_step(self.run_dir)
        assert step is not None, "nothing was saved yet"
        return checkpoint_folder(self.run_dir, step)

    def phase(self, attempt: int, phase: RankPhase, *, last: bool = False) -> dict[str, Any] | None:
        """When an attempt first (or last) came to a phase, and at which step; None if it has not."""
        file = self.run_dir / "drill" / "phases.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        found = [line for line in map(json.loads, lines) if (line["attempt"], line["phase"]) == (attempt, phase)]
        return None if not found else found[-1 if last else 0]

    def verdict(self, attempt: int) -> Verdict | None:
        """The verdict on an attempt; None without any."""
        return Verdict.read(attempt_folder(self.run_dir, attempt))

    def verdict_unix(self, attempt: int) -> float:
        """When it was there."""
        return (attempt_folder(self.run_dir, attempt) / VERDICT_FILE).stat().st_mtime

    def noticed(self, attempt: int) -> float | None:
        """When the first one, rank or agent, wrote down that something was wrong."""
        folder = attempt_folder(self.run_dir, attempt)
        words = [json.loads(file.read_text())["time_unix"] for file in (folder / "errors").glob("rank-*.json")]
        reports = [file.stat().st_mtime for file in (folder / "agents").glob("node-*.json")]
        return min([*words, *reports], default=None)

    def is_saved(self, step: int, since_unix: float) -> bool:
        """Whether the checkpoint of a step was committed after a moment."""
        manifest = checkpoint_folder(self.run_dir, step) / MANIFEST
        try:
            return manifest.stat().st_mtime >= since_unix
        except FileNotFoundError:
            return False

    def wait(self, what: str, condition: Callable[[], object], *, while_running: bool = True) -> None:
        """Wait for something.

        Raises:
            TrialError: the command ended before, or it took too long.
        """
        deadline = time.monotonic() + self.patience_seconds
        while True:
            ended = not self.running
            if condition():
                return
            if ended and while_running:
                raise TrialError(f"{self.run_dir.name}: the run ended before {what}{self.trial.end_of_log}")
            if time.monotonic() > deadline:
                raise TrialError(f"{self.run_dir.name}: waited {self.patience_seconds:.0f} s in vain for: {what}")
            time.sleep(POLL_SECONDS)

    def use(self, overrides: Sequence[str]) -> None:
        """Other overrides of the recipe from now on: a run that has others is stopped, and started again."""
        if tuple(overrides) != self.overrides and self.running:
            self.trial.stop()
            self.wait("the end of the stopped run", lambda: not self.running, while_running=False)
        self.overrides = tuple(overrides)
