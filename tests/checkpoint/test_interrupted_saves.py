"""Saves that die or fail on the way: what was committed stays whole, and nothing half-written is taken for more."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_ranks import job
from ranks import RankError, run_ranks, start_ranks

from dstrain.checkpoint.manifest import committed, step_of
from dstrain.checkpoint.verify import verify
from dstrain.errors import CheckpointError
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.ranks
MIDDLE = "in the middle of the file"
RANK_0_DIES = [
    "save:copy",
    "save:stage",
    "save:write",
    MIDDLE,
    "save:vote",
    "save:commit",
    "save:rename",
    "save:latest",
    "save:prune",
]
RANK_1_DIES = ["save:copy", "save:stage", "save:write", MIDDLE, "save:vote", "save:commit", "save:latest"]
COMMITTED_BEFORE = {"save:latest", "save:prune"}  # rank 0 alone commits, so these say that it has
DEATHS = [(0, phase) for phase in RANK_0_DIES] + [(1, phase) for phase in RANK_1_DIES]


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("train.zero.stage=2", "train.precision=bf16", "checkpoint.keep_last=2")


@pytest.fixture(scope="module")
def run_with_two(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(2, save_twice, recipe, run_dir)
    return run_dir


def save_twice(rank: int, world_size: int, recipe: Recipe, run_dir: Path) -> None:
    run = job(recipe)
    for _ in range(2):
        if run.state.step == 0:
            run.read_rows(2)
        run.train(1)
        run.save(run_dir)


# ---------------------------------------------------------------- killed


@pytest.fixture(scope="module")
def survivors(
    recipe: Recipe, run_with_two: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Path]:
    """The run's folder after a rank was killed in a phase of saving step 3, for each rank and phase."""
    found = {}
    for victim, phase in DEATHS:
        run_dir = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(run_with_two, run_dir)
        ranks = start_ranks(2, die_while_saving, recipe, run_dir, victim, phase)
        with pytest.raises(RankError):
            ranks.results()
        expected = signal.SIGXFSZ if phase == MIDDLE else signal.SIGKILL
        assert ranks.processes[victim].exitcode == -expected, (victim, phase)
        found[victim, phase] = run_dir
    return found


def die_while_saving(rank: int, world_size: int, recipe: Recipe, run_dir: Path, victim: int, phase: str) -> None:
    run = job(recipe).resume(run_dir)
    run.state = replace(run.state, step=3, data_step=3)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def die(entered: str) -> None:
        if rank == victim and phase == entered:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == victim and phase == MIDDLE and entered == "save:write":
            # The kernel kills the process in the write that would make a file longer than this.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    run.save(run_dir, die)


def test_what_was_committed_survives_a_kill_in_any_phase(survivors: dict[tuple[int, str], Path]) -> None:
    for (victim, phase), run_dir in survivors.items():
        steps = [step_of(folder) for folder in committed(run_dir)]
        possible = [[3, 2, 1]] if phase in COMMITTED_BEFORE else [[2, 1]]
        if (victim, phase) == (1, "save:commit"):  # rank 0 commits meanwhile, or is ended with the rest before it does
            possible.append([3, 2, 1])
        if (victim, phase) == (1, "save:latest"):  # so does it with what it removes
            possible.append([3, 2])
        assert steps in possible, (victim, phase)
        for folder in committed(run_dir):
            assert verify(folder) == [], (victim, phase)
        if phase == MIDDLE:
            (half_written,) = run_dir.glob(f"checkpoints/.staging-*/.rank-{victim:05d}.safetensors.new")
            assert half_written.stat().st_size == 20_000


def test_a_killed_save_is_resumed_from_and_the_next_save_cleans_up(
    recipe: Recipe, survivors: dict[tuple[int, str], Path], tmp_path: Path
) -> None:
    half_pruned = survivors[0, "save:prune"] / "checkpoints" / ".pruned-step-0000000001"
    half_pruned.mkdir()
    (half_pruned / "rank-00000.safetensors").write_bytes(b"half")
    expected = {death: step_of(committed(run_dir)[0]) for death, run_dir in survivors.items()}
    for resumed in run_ranks(2, resume_and_save, recipe, survivors):
        assert resumed == expected
    for death, run_dir in survivors.items():
        newest = expected[death]
        assert newest is not None
        names = [f"step-{step:010d}" for step in (newest, newest + 1)]
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", *names], death
        assert (run_dir / "checkpoints" / "latest").read_text() == f"{names[1]}\n"
        for folder in committed(run_dir):
            assert verify(folder) == [], death


def resume_and_save(
    rank: int, world_size: int, recipe: Recipe, run_dirs: dict[tuple[int, str], Path]
) -> dict[tuple[int, str], int]:
    run = job(recipe)
    resumed = {}
    for death, run_dir in run_dirs.items():
        run.resume(run_dir)
        resumed[death] = run.state.step
        run.state = replace(run.state, step=run.state.step + 1, data_step=run.state.data_step + 1)
        run.save(run_dir)
    return resumed


# ---------------------------------------------------------------- the disk is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 kB: room for two checkpoints of the tiny model, not for three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_on_every_rank_and_the_old_checkpoints_stay(
    recipe: Recipe, run_with_two: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    shutil.copytree(run_with_two, run_dir)
    for message in run_ranks(2, save_until_it_fails, recipe, run_dir):
        assert message.startswith("checkpoint not saved: rank ")
        assert f"no space left for {run_dir}/checkpoints/.staging-step-0000000003/rank-0000" in message
        assert "MB free without it); the older checkpoints are intact. Free some space or lower" in message
    assert [step_of(folder) for folder in committed(run_dir)] == [2, 1]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-0000000001",
        "step-0000000002",
    ]
    assert all(verify(folder) == [] for folder in committed(run_dir))


def save_until_it_fails(rank: int, world_size: int, recipe: Recipe, run_dir: Path) -> str:
    run = job(recipe).resume(run_dir)
    run.state = replace(run.state, step=3, data_step=3)
    try:
        run.save(run_dir)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it fitted")


def test_whichever_write_finds_the_disk_full_the_old_checkpoints_stay(
    tiny_recipe: Callable[..., Recipe], small_disk: Path
) -> None:
    recipe = tiny_recipe("checkpoint.keep_last=2")
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    (found,) = run_ranks(1, save_with_ever_more_room, recipe, small_disk / "run")
    # the vote tells of a write of the rank's file
    assert list(dict.fromkeys(where for _, where, _ in found)) == ["save:vote", "save:commit", "save:latest", ""]
    for free, where, steps in found:
        newest = [3, 2] if where == "" else [3, 2, 1] if where == "save:latest" else [2, 1]
        assert steps == newest, (free, where)


def save_with_ever_more_room(
    rank: int, world_size: int, recipe: Recipe, run_dir: Path
) -> list[tuple[int, str, list[int]]]:
    """(pages that were free, phase in which saving step 3 failed, sound checkpoints then) until it fits."""
    run, filler, found = job(recipe), run_dir.parent / "filler", []
    run.read_rows(3)
    for _ in range(2):
        run.train(1)
        run.save(run_dir)
    run.train(1)
    kept = run_dir.with_name("kept")
    shutil.copytree(run_dir, kept)
    free_pages, needed = 0, 0
    while not found or found[-1][1]:
        fill(filler, free_pages)
        where, phases = "", ["save:stage"]
        try:
            run.save(run_dir, phases.append)
        except CheckpointError as error:
            assert "no space left" in str(error), error
            where = phases[-1]
        assert all(verify(folder) == [] for folder in committed(run_dir))
        found.append((free_pages, where, [step_of(folder) or 0 for folder in committed(run_dir)]))
        filler.unlink()
        shutil.rmtree(run_dir)
        shutil.copytree(kept, run_dir)
        # page by page but for the middle of the file
        needed = sum(-(-file.stat().st_size // 4096) for file in (kept / "checkpoints").glob("step-*2/*"))
        free_pages += 1 if free_pages < 6 or free_pages > needed - 6 else 9
    return found


def fill(file: Path, free_pages: int) -> None:
    """Take up a file system but for some pages of 4 kB."""
    with file.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with file.open("r+b") as filler:
        filler.truncate(file.stat().st_size - 4096 * free_pages)


def test_a_run_on_a_full_disk_stops_with_the_reason_and_goes_on_once_there_is_room(
    tiny_recipe: Callable[..., Recipe], small_disk: Path
) -> None:
    recipe = tiny_recipe("train.steps=100000", "checkpoint.every_steps=2", "checkpoint.keep_last=2")
    path, run_dir, filler = small_disk.parent / "recipe.yaml", small_disk / "run", small_disk / "filler"
    path.write_text(resolved_yaml(recipe))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    command = [sys.executable, "-m", "dstrain", "run", str(path), "--procs-per-node", "2", "--run-dir", str(run_dir)]
    # There is room when it starts, which is looked at; somebody else takes it later.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not committed(run_dir) and process.poll() is None:
            time.sleep(0.05)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        said = process.communicate(timeout=240)[0]
    assert process.returncode == 2, said
    assert "no space left for " in said
    assert "Traceback" not in said
    kept = [step_of(folder) or 0 for folder in committed(run_dir)]
    assert kept and all(step % 2 == 0 for step in kept)
    filler.unlink()
    command.insert(5, f"train.steps={kept[0] + 4}")
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [step_of(folder) for folder in committed(run_dir)] == [kept[0] + 4, kept[0] + 2]
