"""A worker of a sweep: takes a trial, runs `dstrain run` for it, reports its evaluations, and ends what is hopeless."""

import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from dstrain.base.processes import start
from dstrain.errors import EXIT_DONE, EXIT_RESTART_ME, UserError
from dstrain.recipe.sweep import Sweep, assignments
from dstrain.report.runs import LoggedMetrics, read_metrics
from dstrain.sweep.study import TakenTrial, finished, take_trial

LOOK_EVERY_SECONDS = 0.5
LOG_NAME = "sweep.log"
HOPELESS_AFTER = 3  # failures without a success: the recipe is at fault, not the values
LAST_LINES = 12
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sweeping:
    """What all workers of one process share."""

    folder: Path
    recipe: str
    overrides: Sequence[str]
    sweep: Sweep
    run_options: Sequence[str]  # of `dstrain run`
    keeps_best: bool  # whether a run ends with the weights of its best evaluation
    stop: threading.Event
    say: Say


def work(sweeping: Sweeping, study: optuna.Study, environment: Mapping[str, str]) -> None:
    """Run trials until there are none left, or `stop` is set: the trial then stops at a checkpoint, to be gone on with.

    Args:
        sweeping: the sweep.
        study: opened for this worker.
        environment: of the runs: this worker's devices and threads.

    Raises:
        UserError: trials fail, or do not have the metric.
    """
    for taken in take_trial(study, sweeping.folder, sweeping.sweep):
        if sweeping.stop.is_set():
            return
        _run(sweeping, study, taken, environment)
        if sweeping.stop.is_set():
            return
        failures = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        if len(failures) >= HOPELESS_AFTER and not finished(study):
            log = taken.folder / LOG_NAME
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise UserError(
                f"{len(failures)} trials failed and none succeeded; the last one's {log} ends with:\n{last}"
            )


def _run(sweeping: Sweeping, study: optuna.Study, taken: TakenTrial, environment: Mapping[str, str]) -> None:
    number, log = taken.trial.number, taken.folder / LOG_NAME
    values = assignments(taken.values)
    # A place in a store is one run's: a trial keeps its checkpoints in its folder.
    overrides = [one for one in sweeping.overrides if not one.startswith("checkpoint.storage=")]
    values.append("checkpoint.storage=null")
    command = [sys.executable, "-m", "dstrain", "run", sweeping.recipe, *overrides, *values]
    command += ["--run-dir", str(taken.folder), *sweeping.run_options]
    pruned = False
    with log.open("ab") as output:
        # A session of its own: Ctrl-C in the terminal is for the sweep, which then stops its runs.
        process = start(command, environment=environment, output=output, own_session=True)
        try:
            reported = 0
            while process.poll() is None:
                if sweeping.stop.wait(LOOK_EVERY_SECONDS):
                    process.send_signal(signal.SIGTERM)
                    process.wait()
                    break
                if not pruned:
                    reported, pruned = _report(sweeping, taken, reported)
                    if pruned:
                        process.send_signal(signal.SIGTERM)
        finally:
            if process.poll() is None:  # this worker fails: its run must not outlive it
                process.send_signal(signal.SIGTERM)
                process.wait()
    shown = ", ".join(values)
    if process.returncode == EXIT_DONE:
        _report(sweeping, taken, 0)
        scores = [score for _, score in _values(sweeping, _evaluations(taken.folder))]
        best_of = min if sweeping.sweep.direction == "minimize" else max
        value = best_of(scores) if sweeping.keeps_best else scores[-1]
        study.tell(taken.trial, value)
        best = finished(study)[0]
        mark = "  ← best so far" if best.number == number else ""
        sweeping.say(f"trial {number}: {sweeping.sweep.metric} {value:.5g}  {shown}{mark}")
    elif pruned:
        study.tell(taken.trial, state=TrialState.PRUNED)
        sweeping.say(f"trial {number}: stopped early, worse than others were at that step  {shown}")
    elif process.returncode == EXIT_RESTART_ME and sweeping.stop.is_set():
        sweeping.say(f"trial {number}: stopped at a checkpoint, to be gone on with")
    else:
        study.tell(taken.trial, state=TrialState.FAIL)
        sweeping.say(f"trial {number}: failed with exit code {process.returncode}, see {log}  {shown}")


def _evaluations(folder: Path) -> LoggedMetrics:
    file = folder / "metrics.jsonl"
    return read_metrics(file) if file.is_file() else LoggedMetrics([], [])


def _values(sweeping: Sweeping, metrics: LoggedMetrics) -> list[tuple[int, float]]:
    """(step, value) of each evaluation. Raises UserError where evaluations lack the metric, or there are none."""
    name = f"valid_{sweeping.sweep.metric}"
    for entry in metrics.evaluations:
        if not isinstance(entry.get(name), int | float):
            there = [key.removeprefix("valid_") for key, value in entry.items() if isinstance(value, int | float)]
            known = ", ".join(key for key in there if key != "step")
            raise UserError(f"sweep.metric={sweeping.sweep.metric} is not among what this task measures: {known}")
    if not metrics.evaluations:
        raise UserError(f"{sweeping.recipe} evaluates nothing, so no trial is better than another; set data.valid")
    return [(int(entry["step"]), float(entry[name])) for entry in metrics.evaluations]


def _report(sweeping: Sweeping, taken: TakenTrial, reported: int) -> tuple[int, bool]:
    """Tell Optuna of the evaluations after the first `reported`: how many there are, and whether one is hopeless.

    A pruner compares the last reported step with that step of other trials, so it is asked after each.
    """
    metrics = _evaluations(taken.folder)
    if not metrics.evaluations:
        return reported, False
    values = _values(sweeping, metrics)
    known = taken.trial.study.get_trials(deepcopy=False)[taken.trial.number].intermediate_values
    hopeless = False
    for step, value in values[reported:]:
        if step not in known:
            taken.trial.report(value, step)
            hopeless = hopeless or taken.trial.should_prune()
    return len(values), hopeless
