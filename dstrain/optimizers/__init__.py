"""What updates the weights: one file for each optimizer, and those of other packages. Imports no torch.

A file says the keys of the recipe's `optimizer` section, the torch class, its parameter groups, and which states it
keeps of each parameter: that is all that the plan of memory, checkpoints of any topology, and ZeRO have to know.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field

from dstrain.base.registry import Registry
from dstrain.base.section import NonNegativeFloat, PositiveFloat, Section
from dstrain.errors import UserError

if TYPE_CHECKING:
    import torch

BYTES_PER_STATE_ELEMENT = 4  # states are fp32, whatever the precision of training


class OptimizerSection(Section):
    """Keys of every optimizer. Biases and norms are never decayed.

    `layer_decay` multiplies the learning rate once for each layer that lies between the parameters and the head (Howard
    & Ruder 2018); 1 gives all the same.
    """

    name: str
    learning_rate: PositiveFloat
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: NonNegativeFloat = 0.01


class Optimizer:
    """An optimizer. Its file has an instance, `OPTIMIZER`.

    Attributes:
        section: the keys of the recipe's `optimizer` section; `name` is a Literal of the optimizer's own name.
        states: names, in the torch class's state of a parameter, of tensors that have an element for each of the
            parameter's. They begin as zeros. A checkpoint holds them, cut as the parameter is.
        whole: what of its update needs a whole parameter, for people, as in "factored second moments"; None where an
            element's update needs that element's weight, gradient and states alone. ZeRO cuts parameters into flat
            ranges, so that an optimizer which needs them whole is refused under every stage but 0.
    """

    section: type[OptimizerSection]
    states: Sequence[str]
    whole: str | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one parameter element."""
        return BYTES_PER_STATE_ELEMENT * len(self.states)

    def torch_class(self) -> "type[torch.optim.Optimizer]":
        """The class that steps. Called on ranks only, so that a plan imports no torch."""
        raise NotImplementedError

    def arguments(self, section: Any) -> dict[str, Any]:
        """What the class takes besides parameters and learning rate.

        Args:
            section: the recipe's, of the class `section`.
        """
        raise NotImplementedError

    def group(self, section: Any, *, is_matrix: bool) -> dict[str, Any]:
        """What differs between parameter groups: by default, that only matrices decay.

        Args:
            section: the recipe's.
            is_matrix: of the parameters of more than one dimension; the others are biases, norms and the like.
        """
        return {"weight_decay": section.weight_decay if is_matrix else 0.0}

    def new_states(self, stepped: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """The states of a tensor before its first step, as the torch class would make them. On ranks only.

        A `step` among them is no state of a checkpoint: it follows from the number of updates that were applied.
        """
        import torch

        return {state: torch.zeros_like(stepped, requires_grad=False) for state in self.states}


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", Optimizer, "dstrain.optimizers")


def installed_optimizers() -> dict[str, Optimizer]:
    """All optimizers by name, but for broken ones, which `checked_optimizer` refuses where a recipe names one."""
    optimizers: dict[str, Optimizer] = {}
    for name in OPTIMIZERS:
        try:
            optimizers[name] = checked_optimizer(name)
        except UserError:
            continue
    return optimizers


def checked_optimizer(name: str) -> Optimizer:
    """The optimizer of this name.

    Raises:
        UserError: it is another package's, which cannot be imported, or whose section recipes could not name.
    """
    optimizer = OPTIMIZERS[name]
    if isinstance(optimizer, type):
        raise UserError(f"optimizer {name} is a class; register an instance, as in OPTIMIZER = {optimizer.__name__}()")
    if missing := [key for key in ("section", "states") if not hasattr(optimizer, key)]:
        raise UserError(
            f"optimizer {name}: {type(optimizer).__name__} lacks {' and '.join(missing)}; add what is missing"
        )
    allowed = get_args(optimizer.section.model_fields["name"].annotation)
    if allowed != (name,):
        raise UserError(
            f"optimizer {name}: `name` of {optimizer.section.__name__} allows {', '.join(map(str, allowed)) or 'any'}; "
            f'make it Literal["{name}"], the name of the entry point'
        )
    return optimizer
