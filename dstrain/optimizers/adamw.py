"""AdamW (Loshchilov & Hutter 2019)."""

from typing import TYPE_CHECKING, Any, Literal

from dstrain.base.section import Fraction, PositiveFloat
from dstrain.optimizers import Optimizer, OptimizerSection

if TYPE_CHECKING:
    import torch

ADAM_STATES = ("exp_avg", "exp_avg_sq")  # as torch calls the first and the second moment


class AdamWSection(OptimizerSection):
    """AdamW (Loshchilov & Hutter 2019). Biases and norms are never decayed.

    `layer_decay` multiplies the learning rate once for each layer that lies between the parameters and the head (Howard
    & Ruder 2018); 1 gives all the same.
    """

    name: Literal["adamw"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class AdamW(Optimizer):
    """Torch's, in its fused form."""

    section = AdamWSection
    states = ADAM_STATES

    def torch_class(self) -> "type[torch.optim.Optimizer]":
        """See `Optimizer`."""
        import torch

        return torch.optim.AdamW

    def arguments(self, section: AdamWSection) -> dict[str, Any]:
        """See `Optimizer`."""
        return {"betas": section.betas, "eps": section.eps, "fused": True}

    def new_states(self, stepped: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """See `Optimizer`."""
        import torch

        step = torch.zeros((), dtype=torch.float32, device=stepped.device)
        return {"step": step, **super().new_states(stepped)}


OPTIMIZER = AdamW()
