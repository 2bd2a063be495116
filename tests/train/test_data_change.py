"""`--allow data-change`: a run that goes on with other data, on two ranks, in one run folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from training import training

from dstrain.checkpoint.commands import _verified
from dstrain.checkpoint.data_change import DATA_CHANGE, PERMISSION
from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.errors import UserError
from dstrain.launch.prepare import check_recipe, write_recipe
from dstrain.proof.account import account
from dstrain.recipe.schema import Recipe
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.reporting import Reporter

pytestmark = pytest.mark.ranks


def train(rank: int, world_size: int, recipe: Recipe, folder: Path) -> None:
    with training(recipe) as (runtime, task), Reporter(runtime, recipe, folder, 1, task.totals.steps) as report:
        Loop(runtime, task, folder, report, StopRequest()).run()


@pytest.fixture
def go_on(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., None]:
    """Start or resume the one run of a test, as `dstrain run` would."""

    def run(steps: int, *overrides: str, allow: str | None = None) -> None:
        recipe = tiny_recipe(f"train.steps={steps}", "schedule.warmup_steps=0", *overrides)
        check_recipe(tmp_path, recipe, allow)
        write_recipe(tmp_path, recipe, allow)
        run_ranks(2, train, recipe, tmp_path)

    return run


def test_other_data_is_refused_then_allowed_once_recorded_and_accounted_for(
    go_on: Callable[..., None], tmp_path: Path
) -> None:
    go_on(3)
    with pytest.raises(UserError, match=r"data\.seed: 1 → 2\n.*or --allow data-change") as refused:
        go_on(5, "data.seed=2")
    assert "train.steps" not in str(refused.value)
    with pytest.raises(UserError, match=r"hidden_size") as refused:
        go_on(5, "data.seed=2", "model.config.hidden_size=64", allow=DATA_CHANGE)
    assert "data.seed" not in str(refused.value), "that alone would be allowed"

    go_on(5, "data.seed=2", "train.global_batch_rows=16", allow=DATA_CHANGE)
    manifest = Manifest.read(checkpoint_folder(tmp_path, 5))
    changed = ["data.seed was 1, is 2", "global_batch_rows was 8, is 16"]
    assert manifest.data_changes == [{"step": 3, "data_step": 2, "changed": changed}]
    assert manifest.data_step == 4, "rows 32 to 63: the numbers 24 to 31 are not used"
    found = account(tmp_path)
    assert found.problems == []
    assert (found.first_step, found.last_step, found.rows) == (1, 5, (0, 63))
    assert [(one.after_step, one.first_row, list(one.changed)) for one in found.data_changes] == [(3, 32, changed)]
    assert [_verified(checkpoint_folder(tmp_path, step)) for step in (3, 5)] == [[], []]

    go_on(6, "data.seed=2", "train.global_batch_rows=16")  # the permission is used up, and not needed
    assert Manifest.read(checkpoint_folder(tmp_path, 6)).data_changes == manifest.data_changes
    assert (tmp_path / PERMISSION).exists()
    with pytest.raises(UserError, match=r"data\.seed: 2 → 3"):
        go_on(7, "data.seed=3", "train.global_batch_rows=16")
    assert account(tmp_path).problems == []


def test_shards_that_changed_under_an_unchanged_recipe_need_it_too_and_other_masks_keep_the_place(
    go_on: Callable[..., None], tmp_path: Path, tiny_corpus: Path
) -> None:
    go_on(2)
    go_on(4, "data.masking.rate=0.3", allow=DATA_CHANGE)
    before, after = (Manifest.read(checkpoint_folder(tmp_path, step)) for step in (2, 4))
    assert after.data_step == 4
    assert all(then > now for now, then in zip(before.cursors, after.cursors, strict=True))
    less = tmp_path / "less"
    less.mkdir()
    shards = sorted((tiny_corpus / "train").glob("*.tar"))
    for shard in shards[1:]:
        (less / shard.name).write_bytes(shard.read_bytes())
    go_on_less = ("data.masking.rate=0.3", f"data.train={less}")
    (tmp_path / PERMISSION).unlink()
    write_recipe(tmp_path, _recipe_of(tmp_path, *go_on_less))  # as if the files had changed, not the recipe
    with pytest.raises(RankError, match="corpus was '"):
        go_on(6, *go_on_less)
    go_on(6, *go_on_less, allow=DATA_CHANGE)
    assert [change["step"] for change in Manifest.read(checkpoint_folder(tmp_path, 6)).data_changes] == [2, 4]
    assert account(tmp_path).problems == []


def _recipe_of(folder: Path, *overrides: str) -> Recipe:
    from dstrain.recipe.load import load_recipe

    return load_recipe(folder / "recipe.yaml", overrides).recipe
