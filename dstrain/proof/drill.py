"""`dstrain drill RECIPE`: faults happen to a run of this recipe, one after another, and each has to be survived.

whole      steps 1 … N without interruption, by the ordinary `dstrain run`
course-1   the same, and while it runs: inject ─► verdict or exit code ─► resumed ─► compare at the next checkpoint
course-2   begun anew, only after a fault that was not survived, or when the steps were used up
"""

import json
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dstrain.base.devices import count_devices
from dstrain.base.phases import RankPhase
from dstrain.diagnose.verdict import Verdict
from dstrain.diagnose.verdict_text import how_it_failed, verdict_summary
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, UserError
from dstrain.plan import batch_plan
from dstrain.plan.batch import most_ranks
from dstrain.proof.account import account
from dstrain.proof.course import Course
from dstrain.proof.faults import CATALOGUE, KILLED, NAMES, Fault, can_mount
from dstrain.proof.linked_corpus import on_linked_corpora
from dstrain.proof.memory_group import MemoryGroup
from dstrain.proof.run_distance import run_distance
from dstrain.proof.trial import Trial, TrialError, trial_recipe
from dstrain.proof.verify_resume import TOLERANCES, empty_folder, topology, value_objections
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe, Recipe

STEPS_OF_A_FAULT = 16
SHORTEST_STEP_SECONDS = 0.05
_LEAST_HANG_SECONDS, _HANG_IN_STEPS = 12.0, 10  # after which a rank that stands still is ended
_LEAST_PATIENCE_SECONDS = 180.0
_PATIENCE_IN_WHOLE_RUNS = 10
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be tried."""

    recipe: Recipe
    faults: tuple[Fault, ...]
    world: int
    steps: int
    save_every: int


@dataclass
class Outcome:
    """What came of one fault. Seconds are None where there was nothing to measure."""

    fault: str
    what: str
    result: Literal["survived", "FAILED", "not tried"] = "not tried"
    verdict: str = ""  # who, how, decision; or the exit code
    detected_after: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # stop, restart, load, first step
    lost_steps: int | None = None
    rows_repeated_or_skipped: int | None = None
    bit_equal: bool | None = None
    compared_at_step: int | None = None
    notes: list[str] = field(default_factory=list)  # objections; or why it was not tried, and the remedy

    @property
    def restarted_after(self) -> float | None:
        """From the fault to the first step after it."""
        return None if not self.seconds else (self.detected_after or 0.0) + sum(self.seconds.values())


def drill(plan: Plan, folder: Path, say: Say) -> list[Outcome]:
    """Train without interruption, then with every fault; one outcome for each.

    Raises:
        TrialError: the uninterrupted run failed.
    """
    recipe = trial_recipe(plan.recipe, plan.steps, plan.save_every)
    if isinstance(recipe, PretrainingRecipe):
        recipe = on_linked_corpora(recipe, folder / "corpus")
    whole = Trial(recipe, folder / "whole")
    say(f"whole: {plan.steps} steps on {topology(plan.world, recipe.train.zero.stage)}")
    began = time.monotonic()
    try:
        whole.start(plan.world)
        whole.finish(expected=EXIT_DONE)
    finally:
        whole.end()
    seconds = time.monotonic() - began
    patience = max(_LEAST_PATIENCE_SECONDS, _PATIENCE_IN_WHOLE_RUNS * seconds)
    hang_timeout_seconds = max(_LEAST_HANG_SECONDS, _HANG_IN_STEPS * seconds / plan.steps)
    recipe = recipe.model_copy(update={"hang_timeout_seconds": hang_timeout_seconds})
    group, mounts, outcomes, courses = MemoryGroup.create(), can_mount(), [], 0
    course: Course | None = None
    try:
        for fault in plan.faults:
            if course is not None and course.newest_step() + STEPS_OF_A_FAULT // 2 > plan.steps:
                course.trial.end()
                course = None
            if course is None:
                courses += 1
                run_dir = folder / f"course-{courses}"
                course = Course(recipe, run_dir, plan.world, group, mounts, SHORTEST_STEP_SECONDS, patience)
            outcome = Outcome(fault.name, fault.what)
            outcomes.append(outcome)
            if (missing := fault.missing(course)) is not None:
                outcome.notes.append(missing)
                continue
            say(f"{course.run_dir.name}: {fault.name}: {fault.what}")
            try_fault(course, fault, outcome, whole.run_dir)
            if outcome.result == "FAILED":
                course.trial.end()
                course = None
    finally:
        if course is not None:
            course.trial.end()
        if group is not None:
            group.remove()
    return outcomes


# ---------------------------------------------------------------- one fault


def try_fault(course: Course, fault: Fault, outcome: Outcome, reference: Path) -> None:
    """Let it happen to a course, wait until it is over, and fill in what came of it."""
    try:
        _until_saved(course, fault.overrides)
        saved, attempt = course.saved_steps(), course.trial.attempts
        course.injected_unix = time.time()
        fault.inject(course)
        if not fault.expected.fails and fault.expected.exit_code is None:
            _passes_by(course, outcome, saved[-1])
            since = course.newest_step()
        else:
            since = _recovers(course, fault, outcome, attempt, saved)
        _compare(course, outcome, reference, since)
    except TrialError as error:
        outcome.notes.append(str(error))
    outcome.result = "FAILED" if outcome.notes else "survived"


def _until_saved(course: Course, overrides: tuple[str, ...]) -> None:
    """A run that has saved twice, once in the present attempt, and has made a step since."""
    course.use(overrides)
    if not course.running:
        course.start()
    attempt, before = course.trial.attempts, course.newest_step()
    began = time.time()

    def saved() -> bool:
        steps = course.saved_steps()
        fresh = len(steps) > 1 and steps[-1] > before and course.is_saved(steps[-1], began)
        return fresh and course.newest_step() > steps[-1] and course.trial.attempts >= attempt

    course.wait("its next checkpoint", saved)


def _passes_by(course: Course, outcome: Outcome, saved: int) -> None:
    """A fault that is no failure: two more checkpoints by the same attempt, and no verdict."""
    attempt = course.trial.attempts
    course.wait("the checkpoint after next", lambda: len([s for s in course.saved_steps() if s > saved]) >= 2)
    outcome.verdict, outcome.lost_steps = "none: no rank failed", 0
    if course.trial.attempts != attempt or course.verdict(attempt) is not None:
        outcome.notes.append("the run was restarted, though nothing had to fail")
    if not course.fired():
        outcome.notes.append("the fault did not happen")


def _recovers(course: Course, fault: Fault, outcome: Outcome, attempt: int, saved: list[int]) -> int:
    """Wait for the failure, give the command again where that is due, and wait for the first step after it.

    Returns:
        The newest step before the failure.
    """
    expected = fault.expected
    if expected.exit_code is None:
        course.wait("the verdict", lambda: course.verdict(attempt))
    else:
        course.wait("the end of the command", lambda: not course.running, while_running=False)
        assert course.trial.process is not None
        code = course.trial.process.returncode
        if code != expected.exit_code:
            outcome.notes.append(f"exit code {code}, not {expected.exit_code}{course.trial.end_of_log}")
        attempt = course.trial.attempts
    over = ended = time.time()
    since, saved = course.newest_step(), [*saved, *(s for s in course.saved_steps() if s > saved[-1])]
    injected = max(course.fired(), course.injected_unix)
    verdict = course.verdict(attempt)
    if verdict is not None:
        ended = course.verdict_unix(attempt)
        over = ended if expected.exit_code is None else over
        noticed = course.noticed(attempt)
        outcome.detected_after = max(0.0, min(ended, noticed or ended) - injected)
    outcome.notes += verdict_objections(expected, verdict, course.rank)
    outcome.verdict = _in_words(verdict, expected.exit_code)
    fault.heal(course)
    if expected.exit_code is not None:
        ended = time.time()
        course.start()
    course.wait("the first step after it", lambda: course.phase(attempt + 1, RankPhase.MADE))
    moments = [course.phase(attempt + 1, phase) for phase in (RankPhase.LOAD, RankPhase.DATA, RankPhase.MADE)]
    load, data, first = (moment["time_unix"] for moment in moments if moment is not None)
    outcome.seconds["stop"] = max(0.0, over - injected - (outcome.detected_after or 0.0))
    outcome.seconds |= {"restart": load - ended, "load": data - load, "first step": first - data}
    loaded = course.phase(attempt + 1, RankPhase.LOAD, last=True)
    resumed = loaded["step"] if loaded is not None else 0
    outcome.lost_steps = since - resumed
    should = {"nothing": since, "stop": since, "newest": saved[-1], "older": saved[-2]}[expected.resumes_from]
    if resumed != should:
        outcome.notes.append(f"resumed from step {resumed}, not from step {should}")
    return since


def _compare(course: Course, outcome: Outcome, reference: Path, since: int) -> None:
    """With the uninterrupted run, at the first checkpoint after step `since`."""
    now = time.time()
    every = course.recipe.checkpoint.every_steps
    step = min(since // every * every + every, course.steps)
    course.wait(
        f"the checkpoint of step {step}",
        lambda: course.is_saved(step, now - course.patience_seconds) and step in course.saved_steps(),
    )
    outcome.compared_at_step = step
    distance = run_distance(course.run_dir, reference, step)
    found = account(course.run_dir)
    rows = sum(dropped.rows[1] - dropped.rows[0] + 1 for dropped in found.dropped)
    outcome.rows_repeated_or_skipped = rows + len(found.problems)
    outcome.notes += found.problems
    if distance.first_other_rows is not None:
        outcome.notes.append(f"other rows from step {distance.first_other_rows} on")
    if distance.other_counters:
        outcome.notes.append(f"other {', '.join(distance.other_counters)} in the checkpoint of step {step}")
    outcome.bit_equal = distance.values_equal and distance.first_other_rows is None
    outcome.notes += value_objections(distance, TOLERANCES[course.recipe.train.precision] if count_devices() else None)


def verdict_objections(expected: Any, verdict: Verdict | None, rank: int) -> list[str]:
    """In what a verdict is not the expected one. Pure."""
    if verdict is None:
        return ["there is no verdict"] if expected.fails else []
    if not expected.fails:
        return [f"there is a verdict, though nothing failed: {_in_words(verdict, None)}"]
    first, found = verdict.first, []
    if expected.blames_rank and first.rank != rank:
        found.append(f"the verdict blames rank {first.rank}, not {rank}")
    how = how_it_failed(first)
    for name, pattern, text in (("what", expected.how, how), ("cause", expected.cause, verdict.cause)):
        if not re.search(pattern, text):
            found.append(f"the verdict's {name} is {text!r}, which has no {pattern!r}")
    if verdict.decision != expected.decision:
        found.append(f"the decision is {verdict.decision!r}, not {expected.decision!r}")
    return found


def _in_words(verdict: Verdict | None, exit_code: int | None) -> str:
    if verdict is None:
        return "none: the command was killed" if exit_code == KILLED else f"none: exit code {exit_code}"
    return verdict_summary(verdict)


# ---------------------------------------------------------------- the command


def drill_command(args: Namespace) -> int:
    """`dstrain drill RECIPE [key=value …]`. Exit code 1 if something was not survived exactly as expected."""
    plan = make_plan(load_recipe(args.recipe, args.overrides).recipe, args)

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    if args.dir is not None:
        outcomes = drill(plan, empty_folder(Path(args.dir)), say)
    else:
        with tempfile.TemporaryDirectory(prefix="dstrain-drill-") as folder:
            outcomes = drill(plan, Path(folder), say)
    passed = all(outcome.result != "FAILED" for outcome in outcomes)
    started = topology(plan.world, plan.recipe.train.zero.stage)
    if args.json:
        content = {"recipe": args.recipe, "steps": plan.steps, "topology": started, "passed": passed}
        print(json.dumps(content | {"faults": [as_json(outcome) for outcome in outcomes]}))
    else:
        print(f"{args.recipe}: {plan.steps} steps on {started}, saved every {plan.save_every}\n")
        print(outcomes_text(outcomes))
    return EXIT_DONE if passed else EXIT_FAILURE


def make_plan(recipe: Recipe, args: Namespace) -> Plan:
    """Check what was asked for, and choose what was not. Raises UserError."""
    names = NAMES if args.faults is None else tuple(name.strip() for name in args.faults.split(","))
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--faults: there is no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    by_name = {fault.name: fault for fault in CATALOGUE}
    least = 2 * STEPS_OF_A_FAULT
    steps = args.steps if args.steps is not None else STEPS_OF_A_FAULT * (len(names) + 1)
    if steps < least or not 1 <= args.save_every <= STEPS_OF_A_FAULT // 4:
        raise UserError(
            f"--steps {steps} with --save-every {args.save_every}: at least {least} steps, saved every 1 to "
            f"{STEPS_OF_A_FAULT // 4}, or faults have no room"
        )
    world = args.world if args.world is not None else min(2, most_ranks(recipe))
    batch_plan(recipe, world)  # refuses more ranks than there are lanes
    return Plan(recipe, tuple(by_name[name] for name in names), world, steps, args.save_every)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """For machines."""
    return asdict(outcome) | {"restarted_after": outcome.restarted_after}


def outcomes_text(outcomes: list[Outcome]) -> str:
    """A table, and below it every objection, and why something was not tried."""
    parts = ("stop", "restart", "load", "first step")
    head = ["fault", "verdict", "detected after", *parts, "restarted after", "lost steps", "rows ±", "afterwards", ""]
    table = [head]
    for outcome in outcomes:
        equal = {None: "", True: "bit-equal", False: "not equal"}[outcome.bit_equal]
        table.append(
            [
                outcome.fault,
                outcome.verdict,
                _seconds(outcome.detected_after),
                *(_seconds(outcome.seconds.get(part)) for part in parts),
                _seconds(outcome.restarted_after),
                _count(outcome.lost_steps),
                _count(outcome.rows_repeated_or_skipped),
                equal,
                outcome.result,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, *(f"{outcome.fault}: {note}" for outcome in outcomes for note in outcome.notes)])


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)
