"""Resuming from a run's folder: past damaged checkpoints, never from another run's, and without reading a pickle."""

import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import job
from ranks import run_ranks

from dstrain.architectures.bert import BertConfig, BertModel
from dstrain.checkpoint.manifest import FORMAT, MANIFEST, Manifest, _written, committed, step_of
from dstrain.checkpoint.verify import verify
from dstrain.errors import CheckpointError
from dstrain.recipe.schema import Recipe

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("train.zero.stage=1")


@pytest.fixture(scope="module")
def run_dir(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with sound checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, train_and_save, recipe, folder)
    return folder


def train_and_save(rank: int, world_size: int, recipe: Recipe, folder: Path) -> None:
    run = job(recipe)
    run.read_rows(4)
    for _ in range(2):
        run.train(2)
        run.save(folder)


def copy_of(run_dir: Path, parent: Path, name: str) -> Path:
    shutil.copytree(run_dir, parent / name)
    return parent / name


# ---------------------------------------------------------------- damage


def damages(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Every way of damaging a checkpoint that is tried, by a name that contains the file's."""

    def flipped(name: str, offset: int) -> Callable[[Path], object]:
        def flip(checkpoint: Path) -> None:
            content = bytearray((checkpoint / name).read_bytes())
            content[offset] ^= 0x10
            (checkpoint / name).write_bytes(content)

        return flip

    def cut(name: str, keep: float) -> Callable[[Path], object]:
        return lambda c: (c / name).write_bytes((c / name).read_bytes()[: int(keep * (c / name).stat().st_size)])

    def removed(name: str) -> Callable[[Path], object]:
        return lambda c: (c / name).unlink()

    found: dict[str, Callable[[Path], object]] = {}
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        for offset in (0, 3, 8, 9, 100, size // 2, size - 1):  # a length, a header, numbers, the last byte
            found[f"{path.name} flipped at {offset}"] = flipped(path.name, offset)
        found[f"{path.name} cut"] = cut(path.name, 0.6)
        found[f"{path.name} emptied"] = cut(path.name, 0)
        found[f"{path.name} removed"] = removed(path.name)
    return found


def test_damage_is_named_and_the_checkpoint_before_is_used(run_dir: Path, recipe: Recipe, tmp_path: Path) -> None:
    newest = committed(run_dir)[0]
    assert {path.name for path in newest.iterdir()} == {MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"}
    folders = {}
    for what, damage in damages(newest).items():
        folders[what] = copy_of(run_dir, tmp_path, what.replace(" ", "-"))
        checkpoint = committed(folders[what])[0]
        damage(checkpoint)
        assert what.split()[0] in verify(checkpoint)[0], what
    for resumed in run_ranks(2, resume_all, recipe, folders):
        for what, (step, skipped) in resumed.items():
            assert step == 2, what
            assert len(skipped) == 1, what
            assert skipped[0].startswith("skipped step-0000000004: "), what
            assert what.split()[0] in skipped[0], what


def resume_all(
    rank: int, world_size: int, recipe: Recipe, folders: dict[str, Path]
) -> dict[str, tuple[int | None, list[str]]]:
    run = job(recipe)
    resumed = {}
    for what, folder in folders.items():
        source = run.resume(folder).source
        assert source is not None
        resumed[what] = (step_of(source.folder), source.skipped)
    return resumed


def test_a_run_goes_on_past_damage_and_saves_over_it(run_dir: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = copy_of(run_dir, tmp_path, "run")
    (committed(folder)[0] / "rank-00001.safetensors").unlink()
    undisturbed = run_ranks(2, resume_train_save, recipe, copy_of(run_dir, tmp_path, "sound"), 0)[0]
    repeated = run_ranks(2, resume_train_save, recipe, folder, 2)[0]
    assert (undisturbed[0], repeated[0]) == (4, 2)
    assert [step_of(path) for path in committed(folder)] == [4, 2]
    assert verify(committed(folder)[0]) == []
    sound, again = committed(run_dir)[0], committed(folder)[0]
    assert Manifest.read(sound).files == Manifest.read(again).files, "two steps done twice give the same bytes"


def resume_train_save(
    rank: int, world_size: int, recipe: Recipe, folder: Path, steps: int
) -> tuple[int, list[tuple[float, str]]]:
    run = job(recipe).resume(folder)
    resumed = run.state.step
    done = run.train(steps)
    run.save(folder)
    return resumed, done


# ---------------------------------------------------------------- refusals


def test_what_belongs_to_something_else_is_refused_with_one_message(
    run_dir: Path, recipe: Recipe, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    newer = copy_of(run_dir, tmp_path, "newer")
    checkpoint = committed(newer)[0]
    stored = asdict(Manifest.read(checkpoint)) | {"format": FORMAT + 1, "novelty": "unknown"}
    (checkpoint / MANIFEST).write_text(_written(stored))
    old = copy_of(run_dir, tmp_path, "old")
    older = committed(old)[0]
    (older / MANIFEST).write_text(_written(asdict(Manifest.read(older)) | {"format": 3, "cursors": [[0, 0, 0]] * 8}))
    ruined = copy_of(run_dir, tmp_path, "ruined")
    for folder in committed(ruined):
        (folder / MANIFEST).unlink()
    assert recipe.model.config is not None
    wide = BertConfig(**recipe.model.config.model_dump() | {"intermediate_size": 96})
    deep = BertConfig(**recipe.model.config.model_dump() | {"num_hidden_layers": 3})
    attempts: list[tuple[Recipe, tuple[str, ...], Path]] = [
        (recipe.model_copy(update={"model": BertModel(architecture="bert", config=wide)}), (), run_dir),
        (recipe.model_copy(update={"model": BertModel(architecture="bert", config=deep)}), (), run_dir),
        (tiny_recipe("data.seed=2", "data.masking.rate=0.3"), (), run_dir),
        (recipe, (), newer),
        (recipe, (), old),
        (recipe, (), ruined),
    ]
    step_4, there = f"{run_dir}/checkpoints/step-0000000004", ruined / "checkpoints"
    expected = [
        f"{step_4} is of another model: bert.encoder.layer.0.intermediate.dense.bias has shape [64] there and "
        f"shape [96] here; use the recipe of that run or another --run-dir",
        f"{step_4} is of another model: bert.encoder.layer.2.attention.output.LayerNorm.bias has no place there and "
        f"shape [32] here; use the recipe of that run or another --run-dir",
        f"{step_4} was saved from other data:\n  data.seed: 1 → 2\n  data.masking.rate: 0.15 → 0.3\n"
        f"put back what changed, or start a new run with another --run-dir; or go on with --allow data-change",
        f"{checkpoint / MANIFEST} is of checkpoint format {FORMAT + 1}, this dstrain reads format {FORMAT}; use the "
        f"version of dstrain that wrote it, or start anew with another --run-dir",
        f"{older / MANIFEST} is of another law of the data (checkpoint format 3, this dstrain has {FORMAT}): start "
        f"anew with another --run-dir, or use the version of dstrain that wrote it",
        f"none of the 2 checkpoints in {there} can be used:\n"
        f"  skipped step-0000000004: {there}/step-0000000004 is not a checkpoint: it has no manifest.json\n"
        f"  skipped step-0000000002: {there}/step-0000000002 is not a checkpoint: it has no manifest.json\n"
        f"restore one from a copy, or start anew with another --run-dir",
    ]
    for messages in run_ranks(2, refused, attempts):
        assert messages == expected


def test_a_model_that_computes_something_else_with_the_same_parameters_is_refused(
    run_dir: Path, recipe: Recipe
) -> None:
    assert recipe.model.config is not None
    heads = BertConfig(**recipe.model.config.model_dump() | {"num_attention_heads": 4})
    other = recipe.model_copy(update={"model": BertModel(architecture="bert", config=heads)})
    (messages,) = run_ranks(1, refused, [(other, (), run_dir)])
    assert messages == [
        f"{run_dir}/checkpoints/step-0000000004 is of another model: num_attention_heads is 2 there and 4 here; use "
        f"the recipe of that run or another --run-dir"
    ]


def test_a_parameter_that_was_frozen_cannot_be_trained_on(recipe: Recipe, tmp_path: Path) -> None:
    (messages,) = run_ranks(1, save_frozen_and_thaw, recipe, tmp_path)
    assert messages == [
        f"{tmp_path}/checkpoints/step-0000000001: bert.embeddings.LayerNorm.bias was frozen there and is trained here "
        f"(exp_avg, exp_avg_sq missing); use the recipe of that run or another --run-dir"
    ]


def refused(rank: int, world_size: int, attempts: list[tuple[Recipe, tuple[str, ...], Path]]) -> list[str]:
    messages = []
    for recipe, frozen, folder in attempts:
        with pytest.raises(CheckpointError) as caught:
            job(recipe, frozen).resume(folder)
        messages.append(str(caught.value))
    return messages


def save_frozen_and_thaw(rank: int, world_size: int, recipe: Recipe, folder: Path) -> list[str]:
    run = job(recipe, frozen=("embeddings",))
    run.train(1)
    run.save(folder)
    return refused(rank, world_size, [(recipe, (), folder)])


def test_a_run_without_checkpoints_starts_at_step_0(recipe: Recipe, tmp_path: Path) -> None:
    assert run_ranks(1, first_step, recipe, tmp_path) == [0]


def first_step(rank: int, world_size: int, recipe: Recipe, folder: Path) -> int:
    return job(recipe).resume(folder).state.step


# ---------------------------------------------------------------- pickle


@pytest.mark.parametrize("stage", [0, 3])
def test_no_pickle_is_read_on_the_way_back(stage: int, run_dir: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    assert run_ranks(2, resume_without_pickle, tiny_recipe(f"train.zero.stage={stage}"), run_dir) == [4, 4]


def resume_without_pickle(rank: int, world_size: int, recipe: Recipe, folder: Path) -> int:
    run = job(recipe)

    def forbidden(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a pickle is read")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(module, name, forbidden)
        with pytest.raises(AssertionError, match="a pickle is read"):
            pickle.load(io.BytesIO(pickle.dumps(1)))
        run.resume(folder)
    return run.state.step


# ---------------------------------------------------------------- a rollback within a run


def test_going_back_within_a_run_restores_everything(run_dir: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    """As `on_nan: rollback` does: the engine has trained on since, and stage 3 has parameters gathered."""
    recipes = [
        tiny_recipe(f"train.zero.stage={stage}", f"train.precision={precision}")
        for stage in range(4)
        for precision in ("fp32", "bf16")
    ]
    for results in run_ranks(2, train_on_and_go_back, recipes, run_dir):
        for recipe, (first, second) in zip(recipes, results, strict=True):
            assert first == second, recipe.train


def train_on_and_go_back(
    rank: int, world_size: int, recipes: list[Recipe], folder: Path
) -> list[tuple[list[object], list[object]]]:
    results = []
    for recipe in recipes:
        run = job(recipe)
        passes: list[list[object]] = []
        for _ in range(2):
            run.resume(folder)
            passes.append([run.probe(), run.train(3), run.probe()])
        results.append((passes[0], passes[1]))
    return results


def test_a_checkpoint_of_the_same_step_is_replaced(run_dir: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = copy_of(run_dir, tmp_path, "run")
    run_ranks(1, save_with_more_rollbacks, recipe, folder)
    assert Manifest.read(committed(folder)[0]).rollbacks == 77
    assert verify(committed(folder)[0]) == []
    assert len(list((folder / "checkpoints").iterdir())) == 3


def save_with_more_rollbacks(rank: int, world_size: int, recipe: Recipe, folder: Path) -> None:
    run = job(recipe).resume(folder)
    run.state = replace(run.state, rollbacks=77)
    run.save(folder)
