"""The linear layers that layers have: where adapters may be."""

from collections.abc import Iterable

Linears = dict[str, tuple[str, str, int]]  # by name within the layer: from which size of a shape to which, times that


def decoder_linears(linears: Linears, cross: Linears) -> Linears:
    """Those of a decoder's layers: with another attention, and an inner size of their own."""
    inner = {"intermediate_size": "decoder_intermediate_size"}
    return {
        name: (inner.get(inputs, inputs), inner.get(outputs, outputs), times)
        for name, (inputs, outputs, times) in (linears | cross).items()
    }


def renamed_linears(linears: Linears, start: str, new: str) -> Linears:
    """Those whose names begin with `start`, beginning with `new`."""
    return {new + name.removeprefix(start): sizes for name, sizes in linears.items() if name.startswith(start)}


def is_target(name: str | None, targets: Iterable[str]) -> bool:
    """Whether a linear layer of this name within its encoder layer (None: of none) is among the targets."""
    return name is not None and any(name == target or name.endswith(f".{target}") for target in targets)
