"""How deep in a model each parameter lies, told by its name."""

import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def head_depth(names: Iterable[str]) -> int:
    """Depth of what comes after the last layer, whether there is anything or not: one more than there are layers."""
    return max((int(found[1]) for name in names if (found := _LAYER.search(name))), default=-1) + 2


def depth_of_parameters(names: Sequence[str]) -> dict[str, int]:
    """Depth by name: 0 for embeddings, 1 and on for layers, one more than the last layer for what comes after them."""
    top = head_depth(names)
    depths = {name: 0 if ".embeddings." in f".{name}" else top for name in names}
    return depths | {name: int(found[1]) + 1 for name in names if (found := _LAYER.search(name))}


def within_layer(name: str) -> str | None:
    """What a name says after its layer's number, as in attention.self.query; None outside of layers."""
    found = _LAYER.search(name)
    return None if found is None else name[found.end() :]
