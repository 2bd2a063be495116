"""Parameter groups, and the optimizer over them."""

from typing import Any

import torch
from torch import nn

from dstrain.errors import RecipeError
from dstrain.model.depth import depth_of_parameters, embeddings_of, head_depth
from dstrain.optimizers import OPTIMIZERS, OptimizerSection
from dstrain.runtime.clipping import clipping


def parameter_groups(
    module: nn.Module, section: OptimizerSection, unfreeze_every_steps: int = 0
) -> list[dict[str, Any]]:
    """Matrices, and vectors and scalars (biases, norms), apart by layer. Frozen parameters are in no group.

    `rate_share` of a group multiplies the learning rate: 1 for the head, `section.layer_decay` for the last layer, its
    square for the one before, and so on to the embeddings. `opens_at` is the number of applied updates before which it
    is not trained, see `unfreezing.py`: 0 for the head, `unfreeze_every_steps` for the last layer, and so on.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    depths = depth_of_parameters(list(dict(module.named_parameters())), embeddings_of(module))
    top = max(depths.values(), default=0)
    below = {name: top - depths[name] for name in trained}  # the uppermost
    rules = {name: (section.layer_decay**count, unfreeze_every_steps * count) for name, count in below.items()}
    optimizer = OPTIMIZERS[section.name]
    groups = []
    for share, opens_at in sorted(set(rules.values()), key=lambda rule: (-rule[0], rule[1])):
        alike = [p for name, p in trained.items() if rules[name] == (share, opens_at)]
        shared = {"rate_share": share, "opens_at": opens_at}
        groups += [
            {
                "params": [p for p in alike if (p.ndim > 1) == is_matrix],
                **optimizer.group(section, is_matrix=is_matrix),
                **shared,
            }
            for is_matrix in (True, False)
        ]
    return [group for group in groups if group["params"]]


def freeze(module: nn.Module, layers: int) -> None:
    """Keep the embeddings and the first `layers` layers as they are. Raises RecipeError where there are fewer."""
    if layers == 0:
        return
    depths = depth_of_parameters(list(dict(module.named_parameters())), embeddings_of(module))
    there = head_depth(depths) - 1
    if layers > there:
        raise RecipeError(f"model.frozen_layers={layers}, and the model has {there} layers; use at most {there}")
    for name, parameter in module.named_parameters():
        if depths[name] <= layers:
            parameter.requires_grad_(False)


def build_optimizer(
    module: nn.Module, section: OptimizerSection, *, clip_grad_norm: float | None, unfreeze_every_steps: int = 0
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameter groups of `module`.

    Args:
        module: what is trained.
        section: the recipe's `optimizer`.
        unfreeze_every_steps: see `parameter_groups`.
        clip_grad_norm: set only where DeepSpeed does not clip (no ZeRO, fp32): then the optimizer clips by itself.
    """
    optimizer = OPTIMIZERS[section.name]
    kind: type[Any] = optimizer.torch_class()
    if clip_grad_norm is not None:
        kind = clipping(kind, clip_grad_norm)
    built: torch.optim.Optimizer = kind(
        parameter_groups(module, section, unfreeze_every_steps),
        lr=0.0,  # set before every step; DeepSpeed may take one by itself to make the states, and must change nothing
        **optimizer.arguments(section),
    )
    return built
