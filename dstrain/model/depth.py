"""How deep in a model each parameter lies, told by its name."""

import re
from collections.abc import Iterable, Mapping, Sequence

_LAYER = re.compile(r"(?:^|\.)(?:layers?|block)\.(\d+)\.")  # T5 counts blocks, each of which has layers
_DECODER = re.compile(r"(?:^|\.)decoder\.")
_EMBEDDINGS = (".embeddings.", ".embed_", ".layernorm_embedding.", ".shared.")


def head_depth(names: Iterable[str]) -> int:
    """Depth of what comes after the last layer, whether there is anything or not: one more than there are layers."""
    return max(_numbers(names).values(), default=-1) + 2


def depth_of_parameters(names: Sequence[str]) -> dict[str, int]:
    """Depth by name: 0 for embeddings, 1 and on for layers, one more than the last layer for what comes after them."""
    top = head_depth(names)
    depths = {name: 0 if any(part in f".{name}" for part in _EMBEDDINGS) else top for name in names}
    return depths | {name: number + 1 for name, number in _numbers(names).items()}


def within_layer(name: str) -> str | None:
    """What a name says after its layer's number, as in attention.self.query; None outside of layers."""
    found = _LAYER.search(name)
    return None if found is None else name[found.end() :]


def _numbers(names: Iterable[str]) -> Mapping[str, int]:
    """The layer of each name that has one, from 0; the layers of a decoder lie above those of its encoder."""
    numbers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
    upper = {name for name in numbers if _DECODER.search(name)}
    below = 1 + max((number for name, number in numbers.items() if name not in upper), default=-1)
    return numbers | {name: numbers[name] + below for name in upper}
