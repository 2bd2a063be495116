"""Saves beside training: they hold what was there when they began, and one that fails costs no checkpoint."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_ranks import Job, job
from ranks import run_ranks

from dstrain.base.phases import RankPhase
from dstrain.checkpoint.manifest import MANIFEST, checkpoint_folder, committed, step_of
from dstrain.checkpoint.verify import verify
from dstrain.data.ledger import LEDGER_NAME, read_ledger
from dstrain.errors import CheckpointError
from dstrain.recipe.schema import Recipe
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.reporting import Reporter
from dstrain.train.saving import Saving, save_progress

pytestmark = pytest.mark.ranks


@dataclass
class Seen:
    """What a rank was told, and what went wrong."""

    waited_in: list[str] = field(default_factory=list)  # phases of training
    phases: list[str] = field(default_factory=list)  # of the saves
    log: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


class Watched(Reporter):
    """Keeps what it is told, and calls `during(phase)` in the thread that saves."""

    during: Callable[[str], None] = staticmethod(lambda _: None)

    def __init__(self, run: Job, run_dir: Path) -> None:
        super().__init__(run.runtime, run.runtime.recipe, run_dir, 1, run.task.totals.steps)
        self.seen = Seen()

    def phase(self, phase: RankPhase, **status: Any) -> None:
        super().phase(phase, **status)
        self.seen.waited_in.append(phase)

    def saving(self, phase: RankPhase) -> None:
        super().saving(phase)
        self.seen.phases.append(phase)
        self.during(phase)

    def say(self, message: str) -> None:
        self.seen.log.append(message)

    def metrics(self, values: dict[str, Any]) -> None:
        super().metrics(values)
        self.seen.metrics.append(values)


@contextmanager
def watched(run: Job, run_dir: Path) -> Iterator[tuple[Watched, Saving]]:
    with Watched(run, run_dir) as report:
        yield report, Saving(run.runtime, run.task, run_dir, report)


@dataclass
class Found:
    """What a rank has to say of each part of the test."""

    beside: Seen
    waited_in_meanwhile: list[str]
    blocks: set[int]  # addresses of the copies
    retried: Seen
    failed: Seen
    loop: Seen
    made_steps: int  # by the loop


def test_saves_beside_training(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("train.zero.stage=2", "train.steps=400", "checkpoint.every_steps=100", "log.every_steps=100")
    ranks: list[Found] = run_ranks(2, all_of_it, recipe, tmp_path)
    manifests = [(checkpoint_folder(tmp_path / name, 2) / MANIFEST).read_bytes() for name in ("plain", "beside")]
    assert manifests[0] == manifests[1], "the digests of every file, and all that is said of the run"
    for name, steps in (("beside", [3, 2]), ("failing", [4, 3]), ("loop", [])):
        assert [step_of(folder) for folder in committed(tmp_path / name)] == steps, name
        assert all(verify(folder) == [] for folder in committed(tmp_path / name)), name
        assert list((tmp_path / name / "checkpoints").glob(".*")) == [], name

    for found in ranks:
        assert set(found.waited_in_meanwhile) <= {"save:begin", "save:copy"}, (
            "training is in no phase of a save that goes on beside it"
        )
        assert found.beside.phases[:4] == ["save:copy", "save:stage", "save:write", "save:vote"]
        assert len(found.blocks) == 1, "one copy, in the same memory each time"
        metrics = found.beside.metrics[0]
        assert (metrics["step"], metrics["saved_step"]) == (3, 2)
        assert 0 < metrics["save_stall_seconds"] < metrics["save_seconds"]

        (reported,) = [line for line in found.retried.log if "again" in line]
        assert reported.startswith("step 4, to be tried again in 0 s: checkpoint not saved: rank 1 of 2: ")
        assert "File too large; the older checkpoints are intact" in reported
        assert found.failed.error.startswith("checkpoint not saved: rank 1 of 2: ")

        assert found.loop.error == found.failed.error.replace("failing", "loop").replace("0000000005", "0000000100")
        assert 100 < found.made_steps < 400, "it stopped after that save began, and long before the end"
        assert found.loop.waited_in[-1] == "save:vote", "the phase that failed is the one on record"


@pytest.mark.parametrize(
    ("hanging", "phase", "meanwhile"),
    [
        (0, "save:stage", "save:stage"),
        (1, "save:write", "save:vote"),
        (0, "save:write", "save:vote"),
        (0, "save:commit", "save:commit"),
        (0, "save:rename", "save:commit"),
        (0, "save:latest", "save:latest"),
        (0, "save:prune", "save:latest"),
        (1, "save:copy", "save:stage"),
    ],
)
def test_the_rank_that_a_save_waits_for_is_behind(hanging: int, phase: str, meanwhile: str) -> None:
    other = 1 - hanging
    assert 0 < save_progress(RankPhase(phase), hanging) < save_progress(RankPhase(meanwhile), other) < 1


def all_of_it(rank: int, world_size: int, recipe: Recipe, folder: Path) -> Found:
    run = job(recipe)
    run.read_rows(3)
    run.train(2)
    job_without_async(run).save(folder / "plain")
    beside, waited_in, blocks = beside_training(run, folder / "beside")
    retried, failed = failing(run, folder / "failing", rank)
    loop, made_steps = in_the_loop(run, folder / "loop", rank)
    return Found(beside, waited_in, blocks, retried, failed, loop, made_steps)


def job_without_async(run: Job) -> Job:
    recipe = run.runtime.recipe
    plain = recipe.checkpoint.model_copy(update={"async_": False})
    return replace(run, runtime=replace(run.runtime, recipe=recipe.model_copy(update={"checkpoint": plain})))


def beside_training(run: Job, run_dir: Path) -> tuple[Seen, list[str], set[int]]:
    """Save, and while the save stands still change every weight and moment; then save again."""
    go_on = threading.Event()

    def stand_still(phase: str) -> None:
        assert phase != "save:write" or go_on.wait(60)

    with watched(run, run_dir) as (report, saving):
        report.during = stand_still  # type: ignore[method-assign]
        saving.begin(run.state, {})
        saving.let_step()
        blocks = {block_of(saving)}
        run.train(1)
        waited_in = list(report.seen.waited_in)
        assert not saving.look(run.state.step)
        go_on.set()
        saving.begin(run.state, {})
        saving.finish()
        blocks.add(block_of(saving))
    return report.seen, waited_in, blocks


def block_of(saving: Saving) -> int:
    assert saving._buffers is not None
    return saving._buffers._block.data_ptr()


def failing(run: Job, run_dir: Path, rank: int) -> list[Seen]:
    """Three saves: rank 1 writes its file at once, at the second attempt, never."""
    found = []
    for failures in range(3):
        with watched(run, run_dir) as (report, saving):
            report.during = FullDisk(failures if rank == 1 else 0)  # type: ignore[method-assign]
            saving.begin(run.state, {})
            try:
                while not saving.idle and not saving.look(run.state.step):
                    time.sleep(0.01)
                saving.finish()
            except CheckpointError as error:
                report.seen.error = str(error)
            found.append(report.seen)
        run.state = replace(run.state, step=run.state.step + 1, data_step=run.state.data_step + 1)
    return found[1:]


class FullDisk:
    """No file of this process gets longer than 20 kB, in the first `failures` writes of a save."""

    def __init__(self, failures: int) -> None:
        self.left = failures

    def __call__(self, phase: str) -> None:
        if phase == "save:write":
            limit = 20_000 if self.left > 0 else resource.RLIM_INFINITY
            self.left -= 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def in_the_loop(run: Job, run_dir: Path, rank: int) -> tuple[Seen, int]:
    """Train with a disk that stays full for rank 1."""
    with Watched(run, run_dir) as report:
        report.during = FullDisk(2 if rank == 1 else 0)  # type: ignore[method-assign]
        with pytest.raises(CheckpointError) as raised:
            Loop(run.runtime, run.task, run_dir, report, StopRequest()).run()
        report.seen.error = str(raised.value)
    run.runtime.barrier()
    return report.seen, next(read_ledger(run_dir / LEDGER_NAME)).step
