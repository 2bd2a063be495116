"""What became of each global batch of a run that dies, rolls back, and passes batches over."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.checkpoint.identity import GlobalBatches
from dstrain.proof.data_steps import Batch, RunBatches
from dstrain.recipe.schema import Recipe

IDENTITY = {"global_batch_rows": 8}
# step, data step, and whether it was skipped; as they were written
LINES = [
    (1, 0, False),
    (2, 1, True),
    (2, 2, False),
    (3, 3, False),  # dropped by a rollback to step 2
    (3, 4, False),
    (4, 5, False),  # made again after a kill
    (4, 5, False),
    (5, 6, False),
]


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("data.skip_rows=[8-9, 80-80]")


def batches(folder: Path, recipe: Recipe, lines: list[tuple[int, int, bool]], last_step: int = 10) -> RunBatches:
    with (folder / "ledger.jsonl").open("w") as ledger:
        for step, data_step, skipped in lines:
            line = {"step": step, "rows": [8 * data_step, 8 * data_step + 7], "digest": "0" * 32}
            ledger.write(json.dumps(line | ({"skipped": True} if skipped else {})) + "\n")
    return RunBatches(folder, GlobalBatches(IDENTITY), recipe, last_step)


def test_every_batch_has_a_fate(tmp_path: Path, recipe: Recipe) -> None:
    run = batches(tmp_path, recipe, LINES)
    assert (run.steps_done, run.data_steps_done, run.last_data_step()) == (5, 7, 12)
    assert run.fates(range(12)) == {
        0: Batch(1, "trained"),
        1: Batch(2, "skipped"),
        2: Batch(2, "trained"),
        3: Batch(3, "rolled back"),
        4: Batch(3, "trained"),
        5: Batch(4, "trained"),
        6: Batch(5, "trained"),
        7: Batch(6, "to come"),
        8: Batch(7, "to come"),
        9: Batch(8, "to come"),
        10: Batch(9, "skipped"),  # row 80
        11: Batch(9, "to come"),
    }
    assert run.data_steps_of(2, 9) == {2: 2, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 11}


def test_a_run_that_ended_with_a_batch_passed_over(tmp_path: Path, recipe: Recipe) -> None:
    run = batches(tmp_path, recipe, [*LINES, (6, 7, True)])
    assert (run.steps_done, run.data_steps_done) == (5, 8)
    assert run.fates([7, 8]) == {7: Batch(6, "skipped"), 8: Batch(6, "to come")}


def test_a_recipe_that_nobody_has_run(recipe: Recipe) -> None:
    run = RunBatches(None, GlobalBatches(IDENTITY), recipe, 10)
    assert run.data_steps_of(1, 3) == {1: 0, 2: 2, 3: 3}
    assert run.last_data_step() == 11
    assert run.fates([1]) == {1: Batch(2, "skipped")}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=4), st.integers(1, 20))
@pytest.mark.slow
def test_what_is_to_come_is_counted_as_if_one_by_one(
    tiny_recipe: Callable[..., Recipe], ranges: list[tuple[int, int]], last_step: int
) -> None:
    rows = ", ".join(f"{first}-{first + more}" for first, more in ranges)
    run = RunBatches(None, GlobalBatches(IDENTITY), tiny_recipe(f"data.skip_rows=[{rows}]"), last_step)
    skipped = {row // 8 for first, more in ranges for row in range(first, first + more + 1)}
    step, expected, data_steps = 0, {}, {}
    for data_step in range(80):
        is_skipped = data_step in skipped
        expected[data_step] = Batch(step + 1, "skipped" if is_skipped else "to come")
        step += not is_skipped
        if not is_skipped:
            data_steps[step] = data_step
    assert run.fates(range(80)) == expected
    assert run.data_steps_of(1, last_step) == {number: data_steps[number] for number in range(1, last_step + 1)}
    assert run.last_data_step() == data_steps[last_step]


def test_after_a_change_of_data_only_its_batches_are_known(tmp_path: Path, recipe: Recipe) -> None:
    batches(tmp_path, recipe, LINES)
    run = RunBatches(tmp_path, GlobalBatches(IDENTITY, (5, 40)), recipe, 10)
    assert run.data_steps_of(2, 6) == {4: 5, 5: 6, 6: 7}
    assert run.fates([5, 6]) == {5: Batch(4, "trained"), 6: Batch(5, "trained")}
