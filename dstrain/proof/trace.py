"""Where a value stopped being finite: the first module by time, in the forward pass or in the backward one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NonFinite:
    """The first value that was not finite. `inputs_finite` and `parameters_finite`: whether this module made it so."""

    module: str  # dotted name
    kind: str  # its class
    pass_name: str  # "forward": in its output; "backward": in the gradient at its output
    values: int  # that are not finite
    of: int
    rows: list[int]  # of the micro-batch
    inputs_finite: bool | None = None  # of a forward pass
    parameters_finite: bool | None = None


@dataclass
class Trace:
    """Fills `found` with the first find and is quiet from then on. Set `rows` before each micro-batch."""

    rows: list[int] = field(default_factory=list)
    found: NonFinite | None = None

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator["Trace"]:
        """Look at every output of every submodule, and at the gradient there, until the end of the block.

        Submodules come before what contains them, so that the find is the innermost module.
        """
        handles = [
            submodule.register_forward_hook(self._hook(name or type(module).__name__), with_kwargs=True)
            for name, submodule in module.named_modules()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            # Attention masks hold -inf, and mean it.
            given = [inputs, *(value for key, value in named.items() if "mask" not in key)]
            for tensor in _tensors(output):
                if self.found is None and (bad := _not_finite(tensor)):
                    self.found = NonFinite(
                        name,
                        type(module).__name__,
                        "forward",
                        bad,
                        tensor.numel(),
                        self.rows,
                        inputs_finite=not any(_not_finite(tensor) for tensor in _tensors(given)),
                        parameters_finite=not any(_not_finite(p) for p in module.parameters()),
                    )
                if self.found is None and tensor.requires_grad:
                    hook = partial(self._look_back, name, type(module).__name__)
                    tensor.register_hook(hook)  # type: ignore[no-untyped-call]

        return look

    def _look_back(self, name: str, kind: str, gradient: Tensor) -> None:
        if self.found is None and (bad := _not_finite(gradient)):
            self.found = NonFinite(name, kind, "backward", bad, gradient.numel(), self.rows)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from (tensor for part in value.values() for tensor in _tensors(part))
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in _tensors(part))


def _not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
