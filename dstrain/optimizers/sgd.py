"""Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dstrain.optimizers import Optimizer, OptimizerSection

if TYPE_CHECKING:
    import torch


class SgdSection(OptimizerSection):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013): 4 bytes of state a parameter, AdamW has 8."""

    name: Literal["sgd"]
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    nesterov: bool = False


class Sgd(Optimizer):
    """Torch's, in its fused form."""

    section = SgdSection
    states = ("momentum_buffer",)

    def torch_class(self) -> "type[torch.optim.Optimizer]":
        """See `Optimizer`."""
        import torch

        return torch.optim.SGD

    def arguments(self, section: SgdSection) -> dict[str, Any]:
        """See `Optimizer`."""
        return {"momentum": section.momentum, "nesterov": section.nesterov, "fused": True}


OPTIMIZER = Sgd()
