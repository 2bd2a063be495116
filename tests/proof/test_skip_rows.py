"""`data.skip_rows`: rows passed over in every attempt and topology, and what accounts for rows agrees."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks

from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.errors import RecipeError
from dstrain.proof.account import account
from dstrain.proof.replay import Replay, replay
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.main import run_rank

RecipeMaker = Callable[..., Recipe]


def train(rank: int, world: int, run_dir: Path) -> str:
    return run_rank(run_dir, 1)


def replay_step(rank: int, world: int, run_dir: Path, step: int) -> Replay:
    return replay(run_dir, step, None, None, trace=False)


@pytest.mark.ranks
def test_rows_are_passed_over_in_every_topology(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    def run(steps: int, world: int, skip_rows: str, stage: int) -> None:
        overrides = (f"train.steps={steps}", "schedule.name=constant", f"train.zero.stage={stage}")
        recipe = tiny_recipe(*overrides, f"data.skip_rows={skip_rows}")
        (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
        assert set(run_ranks(world, train, tmp_path)) == {"done"}

    run(5, world=1, skip_rows="[0-0, 20-25]", stage=0)  # batches 0, 2 and 3, of 8 rows each
    run(8, world=2, skip_rows="[0-0, 20-25, 70-71]", stage=2)  # and 8, once the run has gone on
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    batches = [(line["step"], line["rows"][0] // 8, line.get("skipped", False)) for line in lines]
    assert batches == [
        (1, 0, True), (1, 1, False), (2, 2, True), (2, 3, True), (2, 4, False), (3, 5, False), (4, 6, False),
        (5, 7, False), (6, 8, True), (6, 9, False), (7, 10, False), (8, 11, False),
    ]  # fmt: skip
    manifest = Manifest.read(checkpoint_folder(tmp_path, 8))
    assert (manifest.data_step, manifest.optimizer_steps, manifest.rollbacks) == (12, 8, 0)
    found = account(tmp_path)
    assert (found.problems, found.repeated_steps) == ([], 0)
    assert [(dropped.rows, dropped.after_step) for dropped in found.dropped] == [
        ((0, 7), 0),
        ((16, 31), 1),
        ((64, 71), 5),
    ]
    assert not any(dropped.rolled_back for dropped in found.dropped)
    (replayed,) = run_ranks(1, replay_step, tmp_path, 7)
    assert replayed.same_rows
    assert (replayed.data_step, replayed.steps_trained) == (10, 1)
    assert replayed.loss == pytest.approx(replayed.logged_loss, abs=1e-5)


def test_a_range_that_is_none_is_refused(tiny_recipe: RecipeMaker) -> None:
    with pytest.raises(RecipeError, match=r"data\.skip_rows.* holds 9-3, which ends before it begins; write 3-9"):
        tiny_recipe("data.skip_rows=[1-2, 9-3]")
    with pytest.raises(RecipeError, match=r"data\.skip_rows"):
        tiny_recipe("data.skip_rows=[12]")
