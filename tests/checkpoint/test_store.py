"""Checkpoints in an S3 store: committed by their manifest, read in checked parts, through a network that fails."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_ranks import Job, Piece, job
from ranks import run_ranks
from s3_server import BUCKET, Way, environment, put, refusal, s3_server, use
from synthetic import synthetic_manifest

from dstrain.base.storage import StoragePath
from dstrain.checkpoint import files
from dstrain.checkpoint.commit import explain_os_error
from dstrain.checkpoint.fragments import parse_fragment_key
from dstrain.checkpoint.load import Pieces
from dstrain.checkpoint.manifest import MANIFEST, Manifest, committed
from dstrain.checkpoint.store_owner import claim, owned_store, release
from dstrain.checkpoint.stored import DamagedError, checked_header
from dstrain.checkpoint.targets import StoreTarget
from dstrain.checkpoint.verify import verify
from dstrain.cli import main
from dstrain.errors import CheckpointError
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.rundir.prepare import write_recipe
from dstrain.storages import fsspec as store
from dstrain.storages.fsspec import StoreError

pytestmark = pytest.mark.slow

STATES = ("weight", "exp_avg", "exp_avg_sq")
ELEMENTS = 1_500_000  # of each state: 18 MB in all, several parts and several blocks


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as found:
        yield found.port


@pytest.fixture
def way(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """To the server, for this process."""
    found = Way(server)
    for name, value in environment(found.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "RETRY_AFTER_SECONDS", (0.2, 0.4, 0.8, 1.6))
    monkeypatch.setattr(store, "PART_BYTES", 5 << 20)  # the least that S3 takes
    store._made.cache_clear()
    yield found
    found.cut()
    store._made.cache_clear()


@pytest.fixture
def here(request: pytest.FixtureRequest, way: Way) -> StoragePath:
    """A place of this test alone."""
    return StoragePath(f"s3://{BUCKET}/{request.node.name.partition('[')[0]}")


def numbers(state: str, step: int, elements: int = ELEMENTS) -> torch.Tensor:
    return torch.arange(elements, dtype=torch.float32) + step + STATES.index(state)


def saved(here: StoragePath, step: int, elements: int = ELEMENTS) -> StoragePath:
    """Commit a checkpoint of one parameter."""
    target = StoreTarget(here / f"step-{step:010d}", Path("no run"))
    target.prepare()
    written = target.write("rank-00000.safetensors", [(f"p|{s}|0", numbers(s, step, elements)) for s in STATES])
    target.commit(manifest_of(step, written.entry(), elements), lambda _: None)
    return target.final


def manifest_of(step: int, entry: dict[str, Any], elements: int = ELEMENTS) -> str:
    about = {"p": {"shape": [elements], "states": list(STATES)}}
    manifest = synthetic_manifest(step, {"rank-00000.safetensors": entry})
    return Manifest(**{**vars(manifest), "parameters": about}).text()


# ---------------------------------------------------------------- ranks


def test_saved_by_two_ranks_and_resumed_by_others_under_another_stage(
    server: int, way: Way, here: StoragePath, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipes = [tiny_recipe(f"train.zero.stage={stage}", f"checkpoint.storage={here}") for stage in (1, 3)]
    run_dir = tmp_path / "run"
    write_recipe(run_dir, recipes[0])
    ranks = run_ranks(2, train_and_save, recipes[0], run_dir, environment(server))
    assert [folder.name for folder in committed(run_dir)] == ["step-0000000004", "step-0000000002"]
    assert [verify(folder) for folder in committed(here)] == [[], []]
    assert not (run_dir / "checkpoints").exists()
    for which, at, world in ((1, 4, 1), (0, 2, 2)):
        if at == 2:  # the newest is damaged in a moment, which one of two ranks reads while weights take effect
            damaged = here / "step-0000000004" / "rank-00001.safetensors"
            _, header = checked_header(damaged.parent, damaged.name, Manifest.read(damaged.parent).files[damaged.name])
            states = [parse_fragment_key(key)[1] for key in header]
            assert states == sorted(states, key=lambda state: state != "weight")
            content = bytearray(damaged.read_bytes())
            content[-5] ^= 1
            damaged.write_blocks(lambda content=bytes(content): [content], len(content))  # type: ignore[misc]
        for step, skipped, mine, (loss, rows) in run_ranks(world, resume, recipes[1], run_dir, environment(server)):
            assert step == at
            assert [line.split(":")[0] for line in skipped] == ["skipped step-0000000004"] * (at == 2)
            both = {(*key, offset): values for rank in ranks for key, offset, values in split(rank[which][0])}
            for key, offset, values in split(mine):
                then = np.concatenate([both[piece] for piece in sorted(both) if piece[:2] == key])
                np.testing.assert_array_equal(values, then[offset : offset + len(values)])
            assert rows == ranks[0][which][1][1]
            assert loss == pytest.approx(ranks[0][which][1][0], rel=1e-5)


def split(pieces: list[Piece]) -> Iterator[tuple[tuple[str, str], int, Any]]:
    for parameter, state, offset, values in pieces:
        yield (parameter, state), offset, values


def train_and_save(
    rank: int, world_size: int, recipe: Recipe, run_dir: Path, settings: dict[str, str]
) -> list[tuple[list[Piece], tuple[float, str]]]:
    """Of the steps 2 and 4: all that is resident, and the loss and rows of the step after."""
    use(settings)
    files.DIGEST_BYTES = 1 << 12  # many blocks, so that weights and moments do not share one
    run, found = job(recipe), []
    run.read_rows(5)
    for steps in (2, 1):
        run.train(steps)
        run.save(run_dir)
        found.append((run.resident(), run.train(1)[0]))
    return found


def resume(
    rank: int, world_size: int, recipe: Recipe, run_dir: Path, settings: dict[str, str]
) -> tuple[int, list[str], list[Piece], tuple[float, str]]:
    use(settings)
    run: Job = job(recipe).resume(run_dir)
    assert run.source is not None
    return run.state.step, run.source.skipped, run.resident(), run.train(1)[0]


# ---------------------------------------------------------------- parts and blocks


def test_a_stretch_is_read_without_the_rest(way: Way, here: StoragePath) -> None:
    folder = saved(here, 1)
    manifest = Manifest.read(folder)
    assert len(manifest.files["rank-00000.safetensors"]["blocks"]) == 3
    read: list[int] = []
    ranged = store.FsspecStorage.read

    def counted(self: store.FsspecStorage, url: str, first: int = 0, stop: int | None = None) -> bytes:
        content = ranged(self, url, first, stop)
        read.append(len(content))
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.FsspecStorage, "read", counted)
        view = torch.empty(1000)
        Pieces(folder, manifest).read_into(view, "p", "exp_avg", 70_000)
    assert torch.equal(view, numbers("exp_avg", 1)[70_000:71_000])
    assert sum(read) < (1 << 23) + 1000  # a header, a block
    whole = torch.empty(ELEMENTS, dtype=torch.float64)  # another type, over all blocks
    Pieces(folder, manifest).read_into(whole, "p", "exp_avg_sq", 0)
    assert torch.equal(whole.float(), numbers("exp_avg_sq", 1))


def test_a_changed_byte_is_found_where_it_is_read(here: StoragePath) -> None:
    folder = saved(here, 1)
    path = folder / "rank-00000.safetensors"
    content = path.read_bytes()
    for at, what in ((3, "its header"), (100, "its header"), (10_000_000, "block 1 (bytes 8,388,608 to 16,777,216)")):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_blocks(lambda changed=bytes(changed): [changed], len(content))  # type: ignore[misc]
        with pytest.raises(
            DamagedError, match=rf"rank-00000\.safetensors: {re.escape(what)} (changed since|is not what)"
        ):
            Pieces(folder, Manifest.read(folder)).read_into(torch.empty(ELEMENTS), "p", "exp_avg", 0)
    assert "sha256 differs" in verify(folder)[0]


# ---------------------------------------------------------------- a network that fails


def cut_after(way: Way, sent: int, away_seconds: float | None) -> threading.Thread:
    """Cut the way once so many more bytes were sent; mend it later, or never."""
    began = way.bytes

    def act() -> None:
        while way.bytes < began + sent:
            time.sleep(0.002)
        way.cut()
        if away_seconds is not None:
            time.sleep(away_seconds)
            way.mend()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_an_upload_that_is_cut_is_made_again(way: Way, here: StoragePath) -> None:
    cutting = cut_after(way, 8_000_000, away_seconds=0.7)
    folder = saved(here, 1)
    cutting.join()
    assert way.bytes > 8_000_000 + 18_000_000
    assert verify(folder) == []


def test_a_server_that_is_killed_in_mid_upload_and_comes_back(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RETRY_AFTER_SECONDS", (1.0, 2.0, 4.0, 8.0, 16.0))  # moto takes its time to start
    with s3_server() as mortal:
        gate = Way(mortal.port)  # opened again when the new server has its bucket, and not before
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.port}")

        def come_back() -> None:
            mortal.start()
            gate.mend()

        block, uploads = bytes(range(256)) * 4096, 0

        def blocks() -> Iterator[bytes]:
            nonlocal uploads
            uploads += 1
            for number in range(14):
                if number == 8 and uploads == 1:
                    gate.cut()
                    mortal.kill()
                    threading.Timer(0.5, come_back).start()
                yield block

        path = StoragePath(f"s3://{BUCKET}/killed/file")
        path.write_blocks(blocks, 14 * len(block))
        assert uploads > 1
        assert path.read_bytes() == 14 * block
        gate.cut()


def test_a_server_that_stays_away_is_named_and_leaves_the_older_checkpoint(way: Way, here: StoragePath) -> None:
    older = saved(here, 1)
    target = StoreTarget(here / "step-0000000002", Path("no run"))
    target.prepare()
    cutting = cut_after(way, 8_000_000, away_seconds=None)
    with pytest.raises(StoreError, match=r"the store does not answer: .*; tried 5 times"):
        target.write("rank-00000.safetensors", [(f"p|{s}|0", numbers(s, 2)) for s in STATES])
    cutting.join()
    way.mend()
    assert committed(here) == [older]
    assert verify(older) == []
    target.write("rank-00000.safetensors", [("p|weight|0", numbers("weight", 2))])  # and the process died before more
    assert committed(here) == [older]
    newer = saved(here, 3)
    assert committed(here) == [newer, older]
    assert not target.final.exists()  # what was not committed went with the next save


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [  # as MinIO and Ceph have it
        (
            "507 Insufficient Storage",
            "XMinioStorageFull",
            "Storage backend has reached its minimum free drive threshold.",
        ),
        ("403 Forbidden", "QuotaExceeded", "None"),
    ],
)
def test_a_full_store_is_named_at_once_and_leaves_the_older_checkpoint(
    way: Way, here: StoragePath, tmp_path: Path, status: str, code: str, message: str
) -> None:
    older = saved(here, 1, elements=100)
    target = StoreTarget(here / "step-0000000002", tmp_path)
    target.prepare()
    way.refusal, before = refusal(status, code, message), way.refused
    with pytest.raises(StoreError) as caught:
        target.write("rank-00000.safetensors", [(f"p|{s}|0", numbers(s, 2)) for s in STATES])
    words = explain_os_error(caught.value, target.writing)
    assert "no space left in the store" in words
    assert "; make room, or raise its quota" in words
    assert way.refused - before < 4  # what does not pass is not waited for
    way.refusal = None
    target.abandon()
    assert committed(here) == [older]
    assert verify(older) == []


def test_a_checkpoint_that_is_half_removed_is_none(here: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(here, 1, elements=5)

    def dies(self: StoragePath) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoragePath, "remove_tree", dies)
    with pytest.raises(KeyboardInterrupt):
        StoreTarget(folder, Path("no run")).prepare()
    assert committed(here) == []
    assert (folder / "rank-00000.safetensors").exists()


# ---------------------------------------------------------------- commands, and what they say


def test_commands_take_a_run_with_a_store_and_the_store_itself(
    here: StoragePath, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: Callable[..., Recipe]
) -> None:
    write_recipe(tmp_path, tiny_recipe(f"checkpoint.storage={here}"))
    for step in (1, 2, 3):
        saved(here, step, elements=100)
    for run in (str(tmp_path), str(here)):
        assert main(["ckpt", "ls", run, "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert [entry["folder"] for entry in listed] == [f"{here}/step-000000000{step}" for step in (3, 2, 1)]
    assert main(["ckpt", "verify", str(here)]) == 0
    assert capsys.readouterr().out.count("good") == 3
    assert main(["ckpt", "ls", str(tmp_path), "--json"]) == 0
    assert all(entry["verified_at"] for entry in json.loads(capsys.readouterr().out))
    assert main(["ckpt", "diff", f"{here}/step-0000000001", str(here), "--json"]) == 1
    apart = json.loads(capsys.readouterr().out)["parameters"]["p"]["weight"]
    assert apart["bit_equal"] is False
    assert main(["ckpt", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert [folder.name for folder in committed(here)] == ["step-0000000003"]
    assert not (here / "step-0000000001" / MANIFEST).exists()


def test_a_run_says_what_is_wrong_with_its_store(
    server: int,
    way: Way,
    here: StoragePath,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(resolved_yaml(tiny_recipe()))

    def refused(storage: str) -> str:
        store._made.cache_clear()
        run_dir = str(tmp_path / f"run-{time.monotonic_ns()}")
        assert main(["run", str(recipe), f"checkpoint.storage={storage}", "--run-dir", run_dir]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "bucket does not exist: create the bucket, or correct checkpoint.storage" in refused("s3://nowhere/runs")
    assert "what reads gs:// is not installed" in refused("gs://bucket/runs")
    assert "is no place in an object store" in refused("/some/folder")
    put(server, "/moto-api/reset-auth", b"0", "POST")
    try:
        assert "the store refuses these credentials" in refused(str(here))
    finally:
        put(server, "/moto-api/reset-auth", b"inf", "POST")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there are no credentials for the store" in refused(str(here))


# ---------------------------------------------------------------- one run for each store


def test_a_store_belongs_to_one_run_until_that_lets_go(here: StoragePath, tmp_path: Path) -> None:
    runs = [stored_run(tmp_path / name, here) for name in ("one", "two")]
    with owned_store(runs[0]):
        with pytest.raises(CheckpointError, match=rf"{here} is in use by another run: {runs[0]} on .*process"):
            claim(here, runs[1])
        assert not (runs[1] / "store_owner.json").exists()
    with owned_store(runs[1]):
        assert not (here / "step-0000000001").exists()
    assert not (here / "owner.json").exists()


def test_of_many_who_claim_a_store_at_once_one_has_it(here: StoragePath, tmp_path: Path) -> None:
    def tries(run_dir: Path) -> bool:
        start.wait()
        try:
            claim(here, run_dir)
        except CheckpointError:
            return False
        return True

    runs = [stored_run(tmp_path / f"run-{number}", here) for number in range(8)]
    start = threading.Barrier(len(runs))
    with ThreadPoolExecutor(len(runs)) as pool:
        assert list(pool.map(tries, runs)).count(True) == 1


def test_after_a_crash_the_same_folder_goes_on_and_others_are_let_in_by_hand(
    here: StoragePath, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: Callable[..., Recipe]
) -> None:
    runs = [stored_run(tmp_path / name, here) for name in ("one", "two")]
    program = "import sys; from dstrain.checkpoint.store_owner import claim; from dstrain.base.storage import place"
    program += "; from pathlib import Path; claim(place(sys.argv[1]), Path(sys.argv[2]))"
    program += "; import os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program, str(here), str(runs[0])], check=False).returncode == -9
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(resolved_yaml(tiny_recipe(f"checkpoint.storage={here}")))
    assert main(["run", str(recipe), "--run-dir", str(runs[1])]) == 2
    words = f"error: {here} is in use by another run: {runs[0]} on "
    assert capsys.readouterr().err.startswith(words)
    with owned_store(runs[0]):
        pass
    claim(here, runs[0])  # and killed again
    assert main(["ckpt", "release", str(here)]) == 0
    assert capsys.readouterr().out.startswith(f"{here} was of {runs[0]} on ")
    claim(here, runs[1])
    assert main(["ckpt", "release", str(tmp_path)]) == 2


def test_who_has_lost_a_store_commits_and_removes_nothing_there(here: StoragePath, tmp_path: Path) -> None:
    runs = [stored_run(tmp_path / name, here) for name in ("one", "two")]
    claim(here, runs[0])
    target = StoreTarget(here / "step-0000000004", runs[0])
    target.prepare()
    entry = target.write("rank-00000.safetensors", [("p|weight|0", numbers("weight", 4, 5))]).entry()
    release(here)
    claim(here, runs[1])
    for forbidden in (lambda: target.commit(manifest_of(4, entry, 5), lambda _: None), target.prepare):
        with pytest.raises(CheckpointError, match=rf"is not this run's any more: {runs[1]} on .* has taken it"):
            forbidden()
    assert committed(here) == []
    target.abandon()
    assert (target.final / "rank-00000.safetensors").exists()
    release(here)
    with pytest.raises(CheckpointError, match="this run's claim was taken off it"):
        target.prepare()


def stored_run(run_dir: Path, where: StoragePath) -> Path:
    """A run's folder, as far as its store goes."""
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(f"checkpoint: {{storage: {where}}}\n")
    return run_dir
