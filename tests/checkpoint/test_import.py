"""Checkpoints of DeepSpeed and Accelerate alone, imported: the same state to the bit, and runs that go on from it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from native_ranks import STEPS, TAG, UNIVERSAL, State, train_all, train_with_accelerate
from ranks import run_ranks

from dstrain.checkpoint.load import Pieces
from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.checkpoint.verify import verify
from dstrain.cli import main
from dstrain.proof.account import account
from dstrain.proof.documents import account_of_documents
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

CONFIGS = {
    "stage-1": {"zero_optimization": {"stage": 1}},
    "stage-2": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": True}},
    "stage-3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 500}},
}
Native = tuple[Path, dict[str, State]]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """A folder of what 2 ranks of DeepSpeed and one of Accelerate saved, and the whole state of each."""
    folder = tmp_path_factory.mktemp("native")
    states = run_ranks(2, train_all, folder, CONFIGS)[0]
    return folder, {**states, "accelerate": run_ranks(1, train_with_accelerate, folder / "accelerate")[0]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., Recipe]) -> str:
    path = tmp_path_factory.mktemp("import") / "recipe.yaml"
    path.write_text(resolved_yaml(tiny_recipe("train.steps=6", "train.zero.stage=2", "data.prefetch_steps=0")))
    return str(path)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("source", "of"),
    [
        *((name, name) for name in CONFIGS),
        *((f"{name}/{UNIVERSAL}", name) for name in CONFIGS),
        ("accelerate", "accelerate"),
    ],
)
def test_every_element_of_weights_and_moments_is_the_same(
    native: Native, recipe: str, tmp_path: Path, source: str, of: str
) -> None:
    folder, states = native
    run_dir = tmp_path / "run"
    assert main(["ckpt", "import", str(folder / source), str(run_dir), "--recipe", recipe]) == 0
    checkpoint = checkpoint_folder(run_dir, STEPS)
    manifest = Manifest.read(checkpoint)
    assert verify(checkpoint) == []
    assert manifest.parameters.keys() == states[of].keys()
    assert (manifest.step, manifest.optimizer_steps, manifest.data_step) == (STEPS, STEPS, 0)
    pieces = Pieces(checkpoint, manifest)
    for name, kinds in states[of].items():
        for kind, values in kinds.items():
            read = torch.empty(len(values))
            pieces.read_into(read, name, kind, 0)
            np.testing.assert_array_equal(read.numpy(), values, err_msg=f"{name} {kind}")


@pytest.mark.ranks
def test_a_run_goes_on_from_it_and_accounts_for_its_rows(native: Native, recipe: str, tmp_path: Path) -> None:
    folder, _ = native
    run_dir = tmp_path / "run"
    assert main(["ckpt", "import", str(folder / "stage-3"), str(run_dir), "--recipe", recipe, "--rows", "16"]) == 0
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert main(["run", recipe, "--run-dir", str(run_dir), "--procs-per-node", "1"]) == 0
    newest = checkpoint_folder(run_dir, 6)
    assert verify(newest) == []
    manifest = Manifest.read(newest)
    assert (manifest.optimizer_steps, manifest.data_step) == (6, 2 + 3)
    assert manifest.origin is not None
    assert manifest.origin["step"] == STEPS
    found = account(run_dir)
    assert (found.problems, found.first_step, found.rows) == ([], STEPS + 1, (16, 16 + 3 * 8 - 1))
    documents = account_of_documents(run_dir, manifest, [])
    assert documents is not None
    assert (documents.problems, [source.tokens for source in documents.sources]) == ([], [3 * 8 * 32])
    assert [source.passed_over for source in documents.sources] == [2 * 8 * 32]


@pytest.mark.slow
def test_the_data_goes_on_at_the_beginning_of_a_batch(
    native: Native, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = native
    error = refused(capsys, folder / "stage-1", tmp_path / "run", recipe, "--rows", "20")
    assert "--rows 20: the data goes on at the beginning of a global batch; give 16 or 24" in error


# ---------------------------------------------------------------- what is refused


def refused(capsys: pytest.CaptureFixture[str], source: Path, run_dir: Path, recipe: str, *more: str) -> str:
    """The message; nothing that looks like a checkpoint is left."""
    assert main(["ckpt", "import", str(source), str(run_dir), "--recipe", recipe, *more]) == 2
    assert not list(run_dir.glob("checkpoints/*"))
    assert not list(run_dir.glob("checkpoints/.*"))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.ranks
def test_another_model_is_named_by_its_parameters(
    native: Native, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = native
    for source in ("stage-1", f"stage-3/{UNIVERSAL}", "accelerate"):
        error = refused(capsys, folder / source, tmp_path, recipe, "model.config.num_hidden_layers=3")
        assert "it lacks: bert.encoder.layer.2.attention.self.query.weight, " in error
        error = refused(capsys, folder / source, tmp_path, recipe, "model.config.num_hidden_layers=1")
        assert "it has beside them: bert.encoder.layer.1." in error
        error = refused(capsys, folder / source, tmp_path, recipe, "model.config.max_position_embeddings=32")
        assert "of another shape are: bert.embeddings.position_embeddings.weight ([64, 32], here [32, 32])" in error


@pytest.mark.ranks
def test_incomplete_and_damaged_checkpoints(
    native: Native, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = native
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(folder / "stage-3", copy)
    file = copy / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = file.read_bytes()
    file.unlink()
    assert "optimizer states of 1 ranks, but 2 saved it" in refused(capsys, copy, run_dir, recipe)
    file.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refused(capsys, copy, run_dir, recipe)
    file.write_bytes(content)
    broken = torch.load(file, weights_only=False)
    broken["optimizer_state_dict"]["fp32_flat_groups"][0].detach()[5] = torch.nan
    torch.save(broken, file)
    assert "are not finite" in refused(capsys, copy, run_dir, recipe)
    (copy / "latest").write_text("../elsewhere")
    assert "is no folder beside it" in refused(capsys, copy, run_dir, recipe)


@pytest.mark.ranks
def test_an_optimizer_that_names_nothing_is_not_guessed_at(
    native: Native, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = native
    copy = tmp_path / "copy"
    shutil.copytree(folder / "accelerate", copy)
    optimizer = torch.load(copy / "optimizer.bin")
    state = optimizer["state"]
    state[0], state[1] = state[1], state[0]
    torch.save(optimizer, copy / "optimizer.bin")
    assert "does not name its parameters" in refused(capsys, copy, tmp_path / "run", recipe)


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {Bomb.mark}",)

    mark = ""


@pytest.mark.parametrize("old_form", [False, True])
def test_a_pickle_that_would_run_something_is_refused(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], old_form: bool
) -> None:
    Bomb.mark = str(tmp_path / "exploded")
    source = tmp_path / "source" / TAG
    source.mkdir(parents=True)
    file = source / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Bomb()}, file, _use_new_zipfile_serialization=not old_form)
    error = refused(capsys, source, tmp_path / "run", recipe)
    assert "posix.system" in error
    assert not Path(Bomb.mark).exists()


def test_other_bad_input(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, run_dir = tmp_path / "empty", tmp_path / "run"
    empty.mkdir()
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", run_dir, recipe)
    assert "holds no checkpoint that can be imported" in refused(capsys, empty, run_dir, recipe)
    torch.save({"a": torch.ones(1)}, empty / "pytorch_model.bin")
    assert "no optimizer.bin" in refused(capsys, empty, run_dir, recipe)
    (run_dir / "ledger.jsonl").write_text("")
    assert "holds a run already" in refused(capsys, empty, run_dir, recipe)
