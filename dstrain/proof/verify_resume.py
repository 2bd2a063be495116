"""`dstrain verify-resume RECIPE`: that this recipe comes back exactly, on this machine.

    whole      steps 1 … N without interruption                                     W ranks
    killed     one rank killed by SIGKILL; the supervisor restarts from the checkpoint   W ranks, to the bit
    moved      stopped by SIGTERM; the same command again, and again                 W, V, … ranks, another ZeRO stage

All through the real `dstrain run`, in run folders of their own.
"""

import json
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dstrain.base.devices import count_devices
from dstrain.checkpoint.distance import Distance
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART_ME, UserError
from dstrain.plan import batch_plan
from dstrain.plan.batch import most_ranks
from dstrain.proof.fault_entry import ENTRY, Orders
from dstrain.proof.run_distance import RunDistance, run_distance
from dstrain.proof.trial import Trial, TrialError, dropout_rates, trial_recipe
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe

_SHORTEST_STEP_SECONDS = 0.25  # of a run that is stopped more than once: tiny models would be through before
Say = Callable[[str], None]


@dataclass(frozen=True)
class Tolerance:
    """How far apart runs of different topologies may be: their sums are rounded in another order."""

    loss: float  # relative, as the others
    gradient_norm: float
    states: float


# Adam turns the rounding of a gradient that is 0 in exact arithmetic (keys' biases) into whole steps, hence `states`.
TOLERANCES = {"fp32": Tolerance(1e-5, 1e-4, 1e-2), "bf16": Tolerance(2e-3, 2e-2, 5e-2)}


@dataclass(frozen=True)
class Plan:
    """What is to be tried."""

    recipe: Recipe
    steps: int
    stop_at: int
    worlds: tuple[int, ...]  # where a run begins, and where it is resumed, time after time
    then_stage: int

    @property
    def world(self) -> int:
        """Ranks that a run begins with."""
        return self.worlds[0]

    @property
    def topology(self) -> str:
        """Where the run begins."""
        return topology(self.world, self.recipe.train.zero.stage)

    @property
    def then_topology(self) -> str:
        """Where it is resumed."""
        *between, last = self.worlds[1:]
        return " → ".join([*map(str, between), topology(last, self.then_stage)])


@dataclass(frozen=True)
class Verdict:
    """How one interruption ended. `objections` is empty if it passed."""

    interruption: str
    resumed: str
    distance: RunDistance
    objections: list[str]
    note: str | None


def verify_resume(plan: Plan, folder: Path, say: Say) -> list[Verdict]:
    """Train, interrupt, resume and compare; one verdict for each interruption.

    Args:
        plan: what to try.
        folder: for the run folders.
        say: told what begins.

    Raises:
        TrialError: a run failed, or was over before it could be interrupted.
    """
    recipe = trial_recipe(plan.recipe, plan.steps, plan.stop_at)
    whole = _whole(recipe, folder / "whole", plan, say)
    killed, kill = _killed(recipe, folder / "killed", plan, say)
    verdicts = [_judged(plan, kill, plan.topology, run_distance(killed, whole, plan.steps), other_topology=False)]

    reference, moved_recipe = whole, recipe
    dropout = len(set(plan.worlds)) > 1 and bool(dropout_rates(plan.recipe))
    if dropout and plan.recipe.model.config is not None:
        moved_recipe = trial_recipe(plan.recipe, plan.steps, plan.stop_at, dropout=False)
        reference = _whole(moved_recipe, folder / "whole-without-dropout", plan, say)
    moved, stop = _moved(moved_recipe, folder / "moved", plan, say)
    distance = run_distance(moved, reference, plan.steps)
    note = None
    if dropout:
        note = "other micro-batches draw other dropout: "
        note += "both runs without" if reference != whole else "only rows are judged, the pretrained model has dropout"
    judged_values = not dropout or reference != whole
    verdicts.append(
        _judged(plan, stop, plan.then_topology, distance, other_topology=True, values=judged_values, note=note)
    )
    return verdicts


# ---------------------------------------------------------------- the runs


@contextmanager
def _trial(recipe: Recipe, run_dir: Path, entry: str | None = None) -> Iterator[Trial]:
    trial = Trial(recipe, run_dir, entry)
    try:
        yield trial
    finally:
        trial.end()


def _whole(recipe: Recipe, run_dir: Path, plan: Plan, say: Say) -> Path:
    say(f"{run_dir.name}: {plan.steps} steps on {plan.topology}")
    with _trial(recipe, run_dir) as trial:
        trial.start(plan.world)
        trial.finish(expected=EXIT_DONE)
    return run_dir


def _killed(recipe: Recipe, run_dir: Path, plan: Plan, say: Say) -> tuple[Path, str]:
    rank = plan.world - 1
    say(f"{run_dir.name}: the same, rank {rank} killed after step {plan.stop_at}")
    with _trial(recipe, run_dir) as trial:
        trial.start(plan.world)
        step = trial.wait_for_step(plan.stop_at, plan.stop_at + 1)
        trial.signal_rank(rank, signal.SIGKILL)
        trial.finish(expected=EXIT_DONE)
        if trial.attempts < 2:
            raise TrialError(f"{run_dir.name}: the run was over before rank {rank} could be killed; give more --steps")
    return run_dir, f"SIGKILL of rank {rank} in step {step + 1}"


def _moved(recipe: Recipe, run_dir: Path, plan: Plan, say: Say) -> tuple[Path, str]:
    say(f"{run_dir.name}: stopped after step {plan.stop_at}, resumed on {plan.then_topology}")
    stopped_at = list[int]()
    Orders(_SHORTEST_STEP_SECONDS).write(run_dir)
    with _trial(recipe, run_dir, ENTRY) as trial:
        for world in plan.worlds[:-1]:
            trial.start(world, _other_stage(plan) if stopped_at else [])
            saved = stopped_at[-1] if stopped_at else plan.stop_at
            trial.wait_for_step(saved, saved + 1)
            trial.stop()
            trial.finish(expected=EXIT_RESTART_ME)
            stopped_at.append(trial.newest_step())
            if stopped_at[-1] == plan.steps:
                raise TrialError(f"{run_dir.name}: the run was over before it could be stopped; give more --steps")
        trial.start(plan.worlds[-1], _other_stage(plan))
        trial.finish(expected=EXIT_DONE)
    return run_dir, f"SIGTERM, saved at step {' and '.join(map(str, stopped_at))}"


def _other_stage(plan: Plan) -> list[str]:
    return [f"train.zero.stage={plan.then_stage}"]


# ---------------------------------------------------------------- the judgement


def _judged(
    plan: Plan,
    interruption: str,
    resumed: str,
    distance: RunDistance,
    *,
    other_topology: bool,
    values: bool = True,
    note: str | None = None,
) -> Verdict:
    objections = []
    if not distance.same_rows:
        objections.append(_row_objection(distance))
    exact = not other_topology and not count_devices()  # kernels of GPUs may add in any order
    if values:
        objections += value_objections(distance, None if exact else TOLERANCES[plan.recipe.train.precision])
    return Verdict(interruption, resumed, distance, objections, note)


def value_objections(distance: RunDistance, tolerance: Tolerance | None) -> list[str]:
    """What is further apart than is allowed; without a tolerance, what is not equal to the bit."""
    values = {"loss": distance.loss, "gradient norm": distance.gradient_norm, **distance.states}
    if tolerance is None:
        return [
            f"{name} differs by {found.largest:.1e}, and should be equal to the bit"
            for name, found in values.items()
            if not found.bit_equal
        ]
    limits = {"loss": tolerance.loss, "gradient norm": tolerance.gradient_norm}
    return [
        f"{name} differs by {found.relative:.1e} of its size, more than {limits.get(name, tolerance.states):.0e}"
        for name, found in values.items()
        if not found.relative <= limits.get(name, tolerance.states)  # NaN is none of it
    ]


def _row_objection(distance: RunDistance) -> str:
    if distance.first_other_rows is not None:
        return f"other rows from step {distance.first_other_rows} on"
    if distance.steps_compared != distance.steps:
        return f"the ledgers share {distance.steps_compared} of {distance.steps} steps"
    return f"other {', '.join(distance.other_counters)} in the last checkpoint"


# ---------------------------------------------------------------- the command


def verify_resume_command(args: Namespace) -> int:
    """`dstrain verify-resume RECIPE [key=value …]`. Exit code 1 if something did not come back as it was."""
    plan = make_plan(load_recipe(args.recipe, args.overrides).recipe, args)

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    if args.dir is not None:
        verdicts = verify_resume(plan, empty_folder(Path(args.dir)), say)
    else:
        with tempfile.TemporaryDirectory(prefix="dstrain-verify-resume-") as folder:
            verdicts = verify_resume(plan, Path(folder), say)
    passed = not any(verdict.objections for verdict in verdicts)
    if args.json:
        content = {"recipe": args.recipe, "steps": plan.steps, "stop_at": plan.stop_at, "topology": plan.topology}
        print(json.dumps(content | {"passed": passed, "interruptions": [asdict(verdict) for verdict in verdicts]}))
    else:
        print(f"{args.recipe}: {plan.steps} steps on {plan.topology}, against the same without interruption\n")
        print(verdicts_text(verdicts))
    return EXIT_DONE if passed else EXIT_FAILURE


def make_plan(recipe: Recipe, args: Namespace) -> Plan:
    """Check the numbers, and choose those that were not given. Raises UserError."""
    if not 1 <= args.stop_at < args.steps - 1:
        raise UserError(
            f"--stop-at {args.stop_at} with --steps {args.steps}: the interruption comes after step 1 at the earliest, "
            f"and two steps before the end at the latest"
        )
    zero, worlds = recipe.train.zero, chosen_worlds(recipe, args.world, _numbers(args.then_world))
    for size in worlds:
        batch_plan(recipe, size)  # refuses more ranks than there are lanes
    then_stage = args.then_stage
    if then_stage is None:
        offloaded = zero.offload_optimizer != "none" or zero.offload_params != "none"
        then_stage = zero.stage if offloaded else {0: 2, 1: 3, 2: 3, 3: 1}[zero.stage]
    return Plan(recipe, args.steps, args.stop_at, worlds, then_stage)


def _numbers(text: str | None) -> list[int] | None:
    """Of `--then-world 3,1`."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--then-world {text}: give a number of ranks, or several as in 3,1") from None


def chosen_worlds(recipe: Recipe, world: int | None, then: list[int] | None) -> tuple[int, ...]:
    """The numbers of ranks of a moved run, one after another: by default 2 → 3 → 1, as far as there are lanes."""
    most = most_ranks(recipe)
    first = min(2, most) if world is None else world
    if then is None:
        then = [size for size in (3, 1) if size <= most and size != first] or [first]
    return (first, *then)


def verdicts_text(verdicts: list[Verdict]) -> str:
    """A table, and below it every objection and note."""
    states = list(verdicts[0].distance.states)
    table = [["interruption", "resumed on", "rows", "loss", "gradient norm", *states, ""]]
    for verdict in verdicts:
        distance = verdict.distance
        values = [distance.loss, distance.gradient_norm, *(distance.states[state] for state in states)]
        rows = "the same" if distance.same_rows else "others"
        outcome = "FAILED" if verdict.objections else "passed"
        table.append([verdict.interruption, verdict.resumed, rows, *map(_shown, values), outcome])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    for verdict in verdicts:
        lines += [f"{verdict.interruption}: {text}" for text in [*verdict.objections, *filter(None, [verdict.note])]]
    return "\n".join(lines)


def topology(ranks: int, stage: int) -> str:
    """As `2 ranks, ZeRO-1`."""
    return f"{ranks} rank{'s' if ranks > 1 else ''}, ZeRO-{stage}"


def _shown(distance: Distance) -> str:
    return "bit-equal" if distance.bit_equal else f"{distance.relative:.1e}"


def empty_folder(folder: Path) -> Path:
    """The folder, if it is new or empty. Raises UserError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--dir {folder} exists and is not an empty folder; give a new one")
    return folder
