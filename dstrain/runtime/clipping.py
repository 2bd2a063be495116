"""An optimizer that does what DeepSpeed's ZeRO optimizers do: measure the gradient norm, clip, refuse NaN and infinity.

Without ZeRO in fp32 DeepSpeed steps the plain optimizer, which would turn one NaN into a model of NaNs. The engine
reads `overflow` and `_global_grad_norm` from whichever optimizer it steps.
"""

import math
from typing import Any

import torch
from torch import nn


class Clipping(torch.optim.Optimizer):
    """Goes before an optimizer's class: `class ClippingAdamW(Clipping, torch.optim.AdamW)`; see `clipping`."""

    clip_grad_norm: float = math.inf
    _global_grad_norm: float = 0.0
    overflow: bool = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip and step, or set `overflow` and change nothing."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # took no part; decays all the same, as under every stage and number of ranks
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
            super().step(closure)


def clipping(kind: type[torch.optim.Optimizer], clip_grad_norm: float) -> type[torch.optim.Optimizer]:
    """The class of that kind of optimizer which also clips to a norm; infinity only measures it."""
    return type(f"Clipping{kind.__name__}", (Clipping, kind), {"clip_grad_norm": clip_grad_norm})
