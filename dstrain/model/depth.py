"""How deep in a model each parameter lies, told by its name."""

import re
from collections.abc import Sequence

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def depth_of_parameters(names: Sequence[str]) -> dict[str, int]:
    """Depth by name: 0 for embeddings, 1 and on for layers, one more than the last layer for what comes after them."""
    numbers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
    top = max(numbers.values(), default=-1) + 2
    depths = {name: 0 if ".embeddings." in f".{name}" else top for name in names}
    return depths | {name: number + 1 for name, number in numbers.items()}


def within_layer(name: str) -> str | None:
    """What a name says after its layer's number, as in attention.self.query; None outside of layers."""
    found = _LAYER.search(name)
    return None if found is None else name[found.end() :]
