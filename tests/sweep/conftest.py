"""A recipe that takes a second to train, with something to search."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

SWEEP = """\
sweep:
  metric: loss
  direction: minimize
  trials: {trials}
  sampler: random
  pruner: {pruner}
  parameters:
    optimizer.learning_rate: {{low: 1e-5, high: 1e-2, log: true}}
    train.micro_batch_rows: {{choices: [2, 4]}}
"""


@pytest.fixture
def sweep_recipe(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """`sweep_recipe("train.steps=8", trials=3)`: the path of a tiny recipe with a `sweep:` section."""

    def write(*overrides: str, trials: int = 3, pruner: str = "none") -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(resolved_yaml(tiny_recipe(*overrides)) + SWEEP.format(trials=trials, pruner=pruner))
        return path

    return write
