import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import synthetic_checkpoint, synthetic_manifest

from dstrain.checkpoint.files import write_safetensors
from dstrain.checkpoint.manifest import FORMAT, MANIFEST, Manifest, OtherFormatError, _written, committed, step_of
from dstrain.checkpoint.retention import Retention, prune
from dstrain.checkpoint.verify import check_recipe_of, newest_sound, verify
from dstrain.errors import CheckpointError
from dstrain.recipe.data import MaskedLmData
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.rundir.prepare import identity_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return synthetic_checkpoint(tmp_path, 7)


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def test_a_sound_checkpoint_has_no_problems(checkpoint: Path) -> None:
    assert verify(checkpoint) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_any_flipped_bit_of_any_file_is_found_and_its_file_named(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    checkpoint = synthetic_checkpoint(tmp_path, 7)
    path = data.draw(st.sampled_from(sorted(checkpoint.iterdir())))
    offset = data.draw(st.integers(0, path.stat().st_size - 1))
    flip(path, offset, 1 << data.draw(st.integers(0, 7)))
    problems = verify(checkpoint)
    assert problems
    assert str(path) in problems[0]


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", MANIFEST])
def test_missing_truncated_and_emptied_files_are_named(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        assert str(path) in verify(checkpoint)[0]
    path.unlink()
    (problem,) = verify(checkpoint)
    assert name in problem


def test_an_extra_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    assert verify(checkpoint) == [f"{checkpoint / 'notes.txt'}: not in the manifest"]


def test_all_problems_are_reported_together(checkpoint: Path) -> None:
    flip(checkpoint / "rank-00000.safetensors", 300)
    (checkpoint / "rank-00001.safetensors").unlink()
    assert len(verify(checkpoint)) == 2


@pytest.mark.parametrize(
    ("stretches", "problem"),
    [
        ([(0, 2), (2, 4)], "embed weight: 4 of 21 elements"),
        ([(0, 10), (11, 21)], "elements 10 to 11 do not join"),
        ([(0, 12), (10, 21)], "elements 12 to 10 do not join"),
    ],
)
def test_gaps_and_overlaps_are_found(
    tmp_path: Path, stretches: list[tuple[int, int]], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthetic.SHAPES", {"embed": [7, 3]})
    monkeypatch.setattr("synthetic.STATES", ["weight"])
    folder = tmp_path / "checkpoints" / "step-0000000001"
    folder.mkdir(parents=True)
    pieces = [(f"embed|weight|{start}", torch.zeros(stop - start)) for start, stop in stretches]
    written = write_safetensors(folder / "rank-00000.safetensors", pieces)
    manifest = synthetic_manifest(1, {"rank-00000.safetensors": written.entry()})
    (folder / MANIFEST).write_text(manifest.text())
    assert any(problem in found for found in verify(folder))


def test_pieces_that_the_manifest_does_not_know_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = synthetic_checkpoint(tmp_path, 1)
    known = Manifest.read(checkpoint)
    monkeypatch.setattr("synthetic.SHAPES", {"embed": [7, 3]})
    (checkpoint / MANIFEST).write_text(synthetic_manifest(1, known.files).text())
    assert f"{checkpoint}: norm weight: not in the manifest" in verify(checkpoint)


def test_a_manifest_reads_as_it_was_written(checkpoint: Path) -> None:
    assert Manifest.read(checkpoint).text() == (checkpoint / MANIFEST).read_text()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            3,
            r"is of another law of the data \(checkpoint format 3, this dstrain has 4\): start anew with another "
            r"--run-dir, or use the version of dstrain that wrote it",
        ),
        (
            5,
            "is of checkpoint format 5, this dstrain reads format 4; use the version of dstrain that wrote it, or "
            "start anew with another --run-dir",
        ),
    ],
)
def test_a_sound_manifest_of_another_format_says_so_and_is_not_passed_over(
    checkpoint: Path, number: int, message: str
) -> None:
    assert FORMAT == 4
    other = synthetic_checkpoint(checkpoint.parent.parent, 9)
    stored = asdict(Manifest.read(other)) | {"format": number, "cursors": [[0, 9, 0]]}
    (other / MANIFEST).write_text(_written(stored))
    with pytest.raises(OtherFormatError, match=message):
        Manifest.read(other)
    with pytest.raises(OtherFormatError, match=message):
        newest_sound([other, checkpoint])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"manifest": [], "sha256": "0"}', '"step"', "\x00\xff"])
def test_any_other_content_is_a_damaged_manifest(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        Manifest.read(checkpoint)


# ---------------------------------------------------------------- which ones count


def test_committed_are_only_folders_with_a_checkpoints_name_newest_first(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        synthetic_checkpoint(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    for name in (".staging-step-0000000200", ".pruned-step-0000000001", "step-7", "step-0000000300.bak"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-0000000400").write_text("a file")
    assert [step_of(folder) for folder in committed(tmp_path)] == [100, 20, 9]


def test_newest_sound_passes_over_damaged_ones_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        synthetic_checkpoint(tmp_path, step)
    folders = committed(tmp_path)
    flip(folders[0] / MANIFEST, 50)
    found, skipped = newest_sound(folders)
    assert step_of(found) == 2
    assert len(skipped) == 1
    assert skipped[0].startswith("skipped step-0000000003: ")
    flip(folders[1] / "rank-00000.safetensors", 4)
    flip(folders[2] / "rank-00001.safetensors", 4)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used\nskipped step-0000000003.*\n.*02: .*\n.*01:"):
        newest_sound(folders)


def test_retention_never_counts_later_checkpoints(tmp_path: Path) -> None:
    """Step 40 was damaged, the run went back to 30 and saved 35: with one to keep, 35 stays, and 40 is not it."""
    for step in (20, 30, 35, 40):
        synthetic_checkpoint(tmp_path, step)
    removed = prune(tmp_path, Retention(1), up_to_step=35)
    assert [step_of(folder) for folder in removed] == [30, 20]
    assert [step_of(folder) for folder in committed(tmp_path)] == [40, 35]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-0000000035", "step-0000000040"}


def test_the_manifest_is_plain_json(checkpoint: Path) -> None:
    stored = json.loads((checkpoint / MANIFEST).read_text())
    assert stored["manifest"]["step"] == 7
    assert list(stored["manifest"]["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]


# ---------------------------------------------------------------- what can be wrong with sound bytes


def resealed(checkpoint: Path, **changes: object) -> None:
    """Write the manifest anew with other values, its digest right."""
    (checkpoint / MANIFEST).write_text(replace(Manifest.read(checkpoint), **changes).text())  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_where_they_are(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthetic.SHAPES", {"embed": [4]})
    folder = synthetic_checkpoint(tmp_path, 1, world_size=1)
    pieces = [(f"embed|{state}|0", torch.arange(4.0)) for state in ("weight", "exp_avg", "exp_avg_sq")]
    pieces[1][1][2:] = value
    name = "rank-00000.safetensors"
    written = write_safetensors(folder / name, pieces)
    resealed(folder, files={name: written.entry()})
    assert verify(folder) == [f"{folder / name}: 2 values of embed exp_avg are not finite"]
    # Of what was never trained, a mask of -inf say, nothing is asked.
    pieces = [("embed|weight|0", torch.tensor([0.0, value, 1.0, 2.0]))]
    written = write_safetensors(folder / name, pieces)
    frozen = {"embed": {"shape": [4], "states": ["weight"]}}
    resealed(folder, files={name: written.entry()}, parameters=frozen)
    assert verify(folder) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": 6}, "its manifest is of step 6"),
        ({"optimizer_steps": 8}, "8 applied of 7 steps after 7 batches cannot be"),
        ({"data_step": 5}, "7 applied of 7 steps after 5 batches cannot be"),
        ({"rng": {"scheme": "philox", "seed": 0}}, "random numbers by 'philox', this dstrain knows 'counter'"),
    ],
)
def test_what_cannot_be_of_one_run_is_found(checkpoint: Path, changes: dict[str, object], problem: str) -> None:
    resealed(checkpoint, **changes)
    assert any(problem in found for found in verify(checkpoint)), verify(checkpoint)


def test_a_checkpoint_of_another_recipe_is_found(checkpoint: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    assert isinstance(recipe, MaskedLmRecipe)
    manifest = replace(Manifest.read(checkpoint), identity=identity_of(recipe))
    assert check_recipe_of(checkpoint, manifest, recipe) == []
    renamed = {"crawl": {"shards": recipe.data.train}}
    assert check_recipe_of(checkpoint, manifest, with_sources(recipe, renamed)) == []
    other = tiny_recipe("data.seed=2", "train.global_batch_rows=16")
    assert [problem.split("its run: ")[1] for problem in check_recipe_of(checkpoint, manifest, other)] == [
        "data.seed: 1 → 2",
        "train.global_batch_rows: 8 → 16",
    ]


def with_sources(recipe: MaskedLmRecipe, sources: dict[str, object]) -> Recipe:
    values = recipe.data.model_dump(mode="json", by_alias=True) | {"train": None, "sources": sources}
    return recipe.model_copy(update={"data": MaskedLmData.model_validate_json(json.dumps(values))})


@pytest.mark.parametrize("module", ["checkpoint.verify", "convert.commands", "supervise.run", "observe.status"])
def test_what_a_login_node_runs_needs_no_torch(module: str) -> None:
    code = f"import sys, dstrain.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
