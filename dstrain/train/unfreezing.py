"""Gradual unfreezing (Howard & Ruder 2018): the head first, then one layer after the other from the top.

Until its turn comes, a layer is as if it were frozen. Its gradients are made zeros before anything sees them, so they
count in no norm and no clipping; its learning rate is 0, so it does not decay either; its moments stay zeros, and
Adam's bias correction counts from the step at which it begins. All of that follows from the number of updates
that were applied, which every checkpoint has: a resume, under whichever ZeRO stage, needs no more.
"""

from functools import partial
from typing import Any

from torch import Tensor

from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import Runtime


def unfreeze_every_steps(recipe: Recipe, total_steps: int) -> int:
    """Updates from one layer's turn to the next; 0: all are trained from the first on."""
    rule = recipe.model.unfreezing
    if rule is None:
        return 0
    if rule.every_steps is not None:
        return rule.every_steps
    assert rule.every_epochs is not None and recipe.train.epochs is not None, "a valid recipe has both"
    return max(1, round(rule.every_epochs * total_steps / recipe.train.epochs))


def hold_back(runtime: Runtime, groups: list[dict[str, Any]]) -> None:
    """Have the gradients of these groups be zeros as long as fewer updates were applied than their `opens_at`."""
    for group in groups:
        if group["opens_at"]:
            for parameter in group["params"]:
                parameter.register_hook(partial(_held_back, runtime, group["opens_at"]))


def _held_back(runtime: Runtime, opens_at: int, gradient: Tensor) -> Tensor:
    return gradient if runtime.applied_steps >= opens_at else gradient.new_zeros(gradient.shape)
