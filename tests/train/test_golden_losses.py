"""Losses of three tiny recipes, kept as a file: a refactoring that changes a digit shows it.

They are written anew, where a change is meant, by `DSTRAIN_WRITE_GOLDEN=1 pytest tests/train/test_golden_losses.py`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks
from training import train_steps, training

from dstrain.recipe.schema import Recipe

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
STEPS = 12
RECIPES = {
    "dense": ("train.zero.stage=0",),
    "zero-3": ("train.zero.stage=3", "train.micro_batch_rows=3"),
    "pairs": ("data.pairs={objective: sentence_order, tokens: 32}", "train.zero.stage=1"),
}


def losses(_rank: int, _world: int, recipe: Recipe) -> list[float]:
    with training(recipe) as (runtime, task):
        return train_steps(runtime, task, STEPS)


@pytest.mark.ranks
@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_those_of_the_file(name: str, tiny_recipe: Callable[..., Recipe]) -> None:
    first, second = run_ranks(2, losses, tiny_recipe(*RECIPES[name]))
    assert first == second
    written = json.loads(GOLDEN.read_text())
    if os.environ.get("DSTRAIN_WRITE_GOLDEN"):
        written[name] = [float(f"{loss:.8g}") for loss in first]
        GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
    # Processors differ in the order in which they add: seven digits of the first step, six of the last.
    assert first == pytest.approx(written[name], rel=2e-6)
