"""A step's gradient is a property of its rows: ranks, micro-batches, accumulation and ZeRO stage do not show in it."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from torch import nn
from training import (
    Pieces,
    RecipeMaker,
    dense_labels,
    relative_difference,
    state_pieces,
    train_batch,
    training,
    training_rows,
    whole,
)

from dstrain.architectures import document_mask
from dstrain.data.stream import RowStream
from dstrain.model.encoder import build_model
from dstrain.recipe.schema import Recipe

pytestmark = pytest.mark.ranks
STAGES = (0, 1, 2, 3)
# Every token that is not special is predicted, so rows differ in how many they predict.
# Adam's first moment after one step with beta1 = 0 is the gradient itself.
OVERRIDES = (
    "data.masking.rate=0.99",
    "data.seed=4",
    "train.clip_grad_norm=null",
    "optimizer.betas=[0.0, 0.999]",
    "data.prefetch_steps=0",
)


def gradient_pieces(rank: int, world: int, recipes: list[Recipe]) -> list[tuple[Pieces, float, float]]:
    """On a rank: the gradient of the first global step of each recipe, its loss and its reported norm."""
    results = []
    for recipe in recipes:
        with training(recipe) as (runtime, task):
            with task.steps(0) as batches:
                loss, applied = train_batch(runtime, next(batches), 1e-3)
            assert applied
            results.append((state_pieces(runtime, task, "exp_avg"), loss, runtime.grad_norm()))
    return results


def reference(recipe: Recipe) -> tuple[dict[str, NDArray[np.float32]], float]:
    """The same step in plain torch and Transformers: one batch, the head on every token, a mean over the targets."""
    with RowStream(training_rows(recipe), 0, 1) as stream:
        rows = next(stream)
        labels = dense_labels(rows)
        input_ids, position_ids = (torch.from_numpy(a.astype(np.int64)) for a in (rows.input_ids, rows.position_ids))
    targets_of_rows = (labels >= 0).sum(axis=1)
    assert len(set(targets_of_rows.tolist())) > 2, "rows of equal weight would not show a wrong normalisation"
    model = build_model(recipe.model, recipe.train.seed, {"pad_token_id": 0})
    mask = document_mask(position_ids)
    logits = model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask).logits
    targets = torch.from_numpy(labels.astype(np.int64)).flatten()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
    loss.backward()
    return {name: p.grad.flatten().numpy() for name, p in model.named_parameters()}, loss.item()  # type: ignore[union-attr]


@pytest.mark.parametrize(("world", "micro_batches"), [(1, (8, 3, 1)), (2, (4, 3)), (3, (2, 1)), (5, (1,)), (7, (2,))])
def test_one_gradient_for_every_split_and_stage(
    world: int, micro_batches: tuple[int, ...], tiny_recipe: RecipeMaker
) -> None:
    cases = list(itertools.product(STAGES, micro_batches))
    recipes = [
        tiny_recipe(f"train.zero.stage={stage}", f"train.micro_batch_rows={rows}", *OVERRIDES) for stage, rows in cases
    ]
    expected, expected_loss = reference(recipes[0])
    norm = np.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in expected.values()))
    by_rank = run_ranks(world, gradient_pieces, recipes)
    for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        gradient = whole([pieces for pieces, _, _ in ranks])
        assert relative_difference(gradient, expected) < 1e-6, case
        for _, loss, reported_norm in ranks:
            assert loss == pytest.approx(expected_loss, rel=1e-6), case
            assert reported_norm == pytest.approx(norm, rel=1e-5), case
