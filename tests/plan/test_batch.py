"""Global batches over any number of ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import classification, masked_lm, phased, timeline_of

from dstrain.errors import RecipeError
from dstrain.plan import batch_plan, deepspeed_config, most_ranks


def test_the_batch_is_arithmetic_that_can_be_followed() -> None:
    recipe = masked_lm()
    assert str(batch_plan(recipe, 8)) == "8 ranks × 4 rows × 16 accumulation = 512 rows = 65,536 tokens"
    assert str(batch_plan(recipe, 1)) == "1 rank × 4 rows × 128 accumulation = 512 rows = 65,536 tokens"
    whole = {"global_batch_rows": 256, "micro_batch_rows": 32}
    assert str(batch_plan(masked_lm(train=whole), 56)) == "56 ranks: 4 or 8 of 256 rows each, 57 % used"
    a_lane_each = masked_lm(train=whole, data={"lanes": 256})
    assert str(batch_plan(a_lane_each, 56)) == "56 ranks: 4 or 5 of 256 rows each, 91 % used"
    assert str(batch_plan(masked_lm(train=whole | {"micro_batch_rows": 3}), 64)) == (
        "64 ranks × 2 rows × 2 accumulation = 256 rows = 32,768 tokens"
    )
    odd = masked_lm(train={"global_batch_rows": 80, "micro_batch_rows": 4})
    assert str(batch_plan(odd, 8)) == "8 ranks: 10 of 80 rows each, 83 % used"


@given(lanes=st.integers(1, 96), lane_rows=st.integers(1, 12), micro=st.integers(1, 24), data=st.data())
def test_every_rank_has_its_rows_in_as_many_micro_batches_as_the_others(
    lanes: int, lane_rows: int, micro: int, data: st.DataObject
) -> None:
    rows, world = lanes * lane_rows, data.draw(st.integers(1, lanes))
    recipe = masked_lm(data={"lanes": lanes}, train={"global_batch_rows": rows, "micro_batch_rows": micro})
    batch = batch_plan(recipe, world)
    of_ranks = [sum(row % lanes % world == rank for row in range(rows)) for rank in range(world)]
    assert (batch.fewest_rows, batch.most_rows) == (min(of_ranks), max(of_ranks))
    assert batch.micro_batch_rows <= micro
    assert batch.micro_batch_rows * (batch.accumulation - 1) < batch.most_rows
    assert batch.most_rows <= batch.micro_batch_rows * batch.accumulation
    assert batch.used == rows / (world * batch.micro_batch_rows * batch.accumulation) <= 1
    config = deepspeed_config(recipe, world)
    assert config["train_batch_size"] == (
        world * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    )


@pytest.mark.parametrize("world", [0, -2, 65])
def test_too_many_ranks_are_refused_with_the_most(world: int) -> None:
    with pytest.raises(RecipeError) as caught:
        batch_plan(masked_lm(data={"lanes": 64}), world)
    assert str(caught.value) == (
        f"{world} ranks cannot train example: data.lanes=64 is the most; use 1 to 64 ranks, or more lanes"
    )


def test_the_most_ranks_follow_from_the_batches() -> None:
    assert most_ranks(masked_lm()) == 128
    assert most_ranks(masked_lm(train={"global_batch_rows": 4608})) == 768
    recipe = phased([{"steps": 3, "train": {"global_batch_rows": 12}}, {"steps": 3}])
    with pytest.raises(
        RecipeError, match=r"data\.lanes: null is 4 lanes for its batches; use 1 to 4 ranks, or batches with a"
    ):
        batch_plan(recipe, 5)
    assert most_ranks(classification(steps=1)) == 32
    with pytest.raises(RecipeError, match=r"train\.global_batch_rows=32 gives a row to as many; use 1 to 32 ranks"):
        batch_plan(classification(steps=1), 33)


def test_a_phase_has_a_batch_of_its_own() -> None:
    rows = {"global_batch_rows": 24, "micro_batch_rows": 3}
    recipe = phased([{"steps": 3}, {"steps": 3, "train": rows, "data": {"sequence_length": 32}}])
    first, second = timeline_of(recipe).phases
    assert str(batch_plan(recipe, 2, first)) == "2 ranks × 4 rows × 1 accumulation = 8 rows = 128 tokens"
    assert str(batch_plan(recipe, 2, second)) == "2 ranks × 3 rows × 4 accumulation = 24 rows = 768 tokens"
    assert deepspeed_config(recipe, 2, second)["train_batch_size"] == 24
