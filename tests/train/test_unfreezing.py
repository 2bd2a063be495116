"""Gradual unfreezing: it computes what freezing by hand computes, under every ZeRO stage and across a resume."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from dstrain.model.depth import depth_of_parameters
from dstrain.recipe.load import load_recipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.token_classification import TokenClassification

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from labelled import write_examples
from test_heads import live, write_recipe

pytestmark = pytest.mark.ranks

EVERY, STEPS = 2, 8  # a head, two layers and embeddings: these begin after 6 updates
KEYS = [f"model.unfreezing.every_steps={EVERY}", "optimizer.weight_decay=0.1", "train.clip_grad_norm=0.05"]


def lives(rank: int, world: int, path: Path, folder: Path) -> dict[str, Any]:
    """The weights after all steps, begun under one stage, stopped after `steps` and ended under another."""
    found = {}
    for first, steps, last in ((0, STEPS, 0), (1, 4, 2), (3, 3, 3), (3, STEPS, 3), (1, STEPS, 1)):
        run_dir = folder / f"{first}-{steps}-{last}"
        for stage, stop in ((first, steps), (last, STEPS)):
            if (run_dir / "checkpoints").exists() and stop == steps:
                continue  # it was not interrupted
            (found[run_dir.name],) = live(rank, world, path, run_dir, [stop], [*KEYS, f"train.zero.stage={stage}"])
    return found


def by_hand(path: Path) -> dict[str, Any]:
    """The same in plain torch: what is not trained yet has no gradient, and no state in the optimizer."""
    recipe = load_recipe(path, [*KEYS, f"train.steps={STEPS}"]).recipe
    task = TokenClassification(recipe, Runtime.offline(recipe))  # type: ignore[arg-type]
    parameters = dict(task.model.named_parameters())
    depths = depth_of_parameters(list(parameters))
    groups = [
        {"params": [p for p in parameters.values() if (p.ndim > 1) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.optimizer.learning_rate)
    with task.rank_steps(0, 1, 0) as batches:
        for step in range(STEPS):
            for name, parameter in parameters.items():
                parameter.requires_grad_((3 - depths[name]) * EVERY <= step)
            batch = next(batches)
            optimizer.zero_grad()
            for micro_batch in batch.micro_batches:
                loss, _ = micro_batch.run(task.module)
                (loss / batch.targets).backward()
            torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], 0.05)
            optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def test_layers_begin_one_after_the_other(tmp_path: Path) -> None:
    write_examples(tmp_path)
    path = write_recipe(tmp_path, "tags")
    found, other = run_ranks(2, lives, path, tmp_path)
    assert found == other
    reference = by_hand(path)
    for name, weights in found.items():
        for parameter, values in weights.items():
            assert np.allclose(values, reference[parameter], atol=2e-5), f"{name}: {parameter}"
    assert found["1-4-2"] == found["1-8-1"], "to the last bit, wherever it is interrupted"
    assert found["3-3-3"] == found["3-8-3"]


def test_what_is_not_trained_yet_stays_as_it_is(tmp_path: Path) -> None:
    write_examples(tmp_path)
    path = write_recipe(tmp_path, "tags")
    bf16 = [*KEYS, "train.precision=bf16", "train.zero.stage=2"]
    ((two, four, five),) = run_ranks(1, live, path, tmp_path / "run", [2, 4, 5], bf16)
    changed = {name.split(".")[2] for name in two if two[name] != four[name] and ".layers." in name}
    assert changed == {"1"}, "the last layer only"
    changed = {name.split(".")[2] for name in two if four[name] != five[name] and ".layers." in name}
    assert changed == {"0", "1"}
    assert not [name for name in two if two[name] != five[name] and "embeddings" in name]
