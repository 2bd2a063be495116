"""The memory of a sweep: Optuna's study in the sweep's folder, shared by all who work on it.

Any number of workers, threads of one process or jobs on several nodes, take trials from it. A worker holds the lock of
its trial's folder as long as it lives; a trial that is marked as running and whose lock is free was left behind, and
the next worker goes on with it, from its newest checkpoint.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from dstrain.errors import UserError
from dstrain.recipe.sweep import SearchedKey, Sweep, Value, is_chance

DATABASE, JOURNAL = "study.db", "study.journal"
_IDENTITY = "dstrain"
GRACE_TRIALS = 4  # the median of fewer says little


@dataclass(frozen=True)
class TakenTrial:
    """A trial that this worker holds."""

    trial: Trial
    folder: Path
    values: dict[str, Value]  # by dotted key


def open_study(folder: Path, sweep: Sweep, identity: dict[str, Any], *, shared: bool) -> optuna.Study:
    """The study in a folder, made where there is none.

    Args:
        folder: of the sweep.
        sweep: what is searched; the number of trials may change from one time to the next.
        identity: JSON of the recipe that the trials are runs of.
        shared: whether jobs on several nodes work on it: a journal, which works on a network disk, instead of SQLite.

    Raises:
        UserError: the folder is that of another sweep, or cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps({"recipe": identity, "sweep": sweep.model_dump(exclude={"trials"})}))
    with locked(folder / "sweep.lock"):
        study = optuna.create_study(
            storage=_storage(folder, shared=shared),
            pruner=_pruner(sweep),
            study_name="sweep",
            direction=sweep.direction,
            load_if_exists=True,
        )
        before = study.user_attrs.get(_IDENTITY)
        if before is None:
            study.set_user_attr(_IDENTITY, identity)
        elif before != identity:
            parts = " and ".join(part for part in identity if before[part] != identity[part])
            raise UserError(f"{folder} holds a sweep with another {parts}; give another --dir, or delete that folder")
    return study


def take_trial(study: optuna.Study, folder: Path, sweep: Sweep) -> Iterator[TakenTrial]:
    """Yield trials as long as there are any, those left behind first; each is held until the next is asked for."""
    while True:
        with locked(folder / "sweep.lock"):
            taken = _left_behind(study, folder, sweep) or _new(study, folder, sweep)
        if taken is None:
            return
        held, trial = taken
        try:
            yield trial
        finally:
            os.close(held)


def _left_behind(study: optuna.Study, folder: Path, sweep: Sweep) -> tuple[int, TakenTrial] | None:
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        held = _lock(trial_folder(folder, frozen.number) / "worker.lock", wait=False)
        if held is not None:
            # Optuna goes on with a trial by its id in the storage, which only a private name has.
            return held, _taken(Trial(study, frozen._trial_id), folder, sweep)
    return None


def _new(study: optuna.Study, folder: Path, sweep: Sweep) -> tuple[int, TakenTrial] | None:
    trials = study.get_trials(deepcopy=False)
    # One whose worker died before it began.
    waiting = trials[-1:] if trials and trials[-1].state == TrialState.WAITING else []
    number = len(trials) - len(waiting)
    if number >= planned_trials(sweep):
        return None
    if sweep.sampler != "grid":
        study.sampler = _sampler(sweep, number)
    elif not waiting:
        study.enqueue_trial(grid_point(sweep, number))
    trial = study.ask()
    held = _lock(trial_folder(folder, trial.number) / "worker.lock", wait=False)
    assert held is not None
    return held, _taken(trial, folder, sweep)


def planned_trials(sweep: Sweep) -> int:
    """How many there are to be: a grid has no more than its points."""
    if sweep.sampler != "grid":
        return sweep.trials
    return min(sweep.trials, math.prod(len(searched.choices or ()) for searched in sweep.parameters.values()))


def grid_point(sweep: Sweep, number: int) -> dict[str, Value]:
    """The values of a grid's trial: the last key's choices change from one trial to the next.

    Optuna's own grid draws points that are not done yet, and two who draw at once may draw the same.
    """
    point: dict[str, Value] = {}
    for key, searched in reversed(sweep.parameters.items()):
        choices = searched.choices or ()
        number, index = divmod(number, len(choices))
        point[key] = choices[index]
    return {key: point[key] for key in sweep.parameters}


def _taken(trial: Trial, folder: Path, sweep: Sweep) -> TakenTrial:
    values = {key: _suggested(trial, key, searched) for key, searched in sweep.parameters.items()}
    return TakenTrial(trial, trial_folder(folder, trial.number), values)


def _suggested(trial: Trial, key: str, searched: SearchedKey) -> Value:
    if searched.choices is not None:
        return cast(Value, trial.suggest_categorical(key, list(searched.choices)))
    low, high = searched.low, searched.high
    assert low is not None and high is not None
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=searched.log)
    return trial.suggest_float(key, low, high, log=searched.log)


def trial_folder(folder: Path, number: int) -> Path:
    """The run's folder of a trial."""
    return folder / f"trial-{number:04d}"


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with a value, best first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    return sorted(complete, key=lambda trial: sign * (trial.value or 0.0))


@dataclass(frozen=True)
class Group:
    """Trials that differ by chance alone: the values that they share, and mean and deviation of their metric."""

    values: dict[str, Value]
    numbers: list[int]
    mean: float
    deviation: float  # of a sample; 0 of a single trial


def by_values(study: optuna.Study) -> list[Group]:
    """Trials with a value in groups that differ by chance alone, the best mean first."""
    members: dict[str, list[FrozenTrial]] = {}
    for trial in finished(study):
        shared = {key: value for key, value in trial.params.items() if not is_chance(key)}
        members.setdefault(json.dumps(shared), []).append(trial)
    groups = []
    for written, trials in members.items():
        scores = [trial.value or 0.0 for trial in trials]
        deviation = stdev(scores) if len(scores) > 1 else 0.0
        groups.append(Group(json.loads(written), [trial.number for trial in trials], fmean(scores), deviation))
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    return sorted(groups, key=lambda group: sign * group.mean)


# ---------------------------------------------------------------- parts of a study


def _storage(folder: Path, *, shared: bool) -> BaseStorage:
    """SQLite, or a journal file; what is there already goes on as it is."""
    if (folder / DATABASE).exists() or not (shared or (folder / JOURNAL).exists()):
        if shared:
            raise UserError(f"{folder} holds a sweep of one machine ({DATABASE}); give another --dir for many nodes")
        return RDBStorage(f"sqlite:///{folder / DATABASE}", engine_kwargs={"connect_args": {"timeout": 60}})
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def _sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    """Seeded by the trial's number: whoever takes it, and after whatever interruption, no two draw alike."""
    seed = 1_000_003 * sweep.seed + number
    if sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=GRACE_TRIALS)
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    return optuna.pruners.NopPruner()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel lets go of when this process ends."""
    held = _lock(path, wait=True)
    assert held is not None
    try:
        yield
    finally:
        os.close(held)


def _lock(path: Path, *, wait: bool) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
