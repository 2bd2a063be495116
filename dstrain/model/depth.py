"""How deep in a model each parameter lies, told by its name."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from dstrain.architectures import ARCHITECTURES

_LAYER = re.compile(r"(?:^|\.)(?:layers?|block)\.(\d+)\.")  # T5 counts blocks, each of which has layers
_DECODER = re.compile(r"(?:^|\.)decoder\.")
_EMBEDDINGS = (".embeddings.", ".embed_", ".layernorm_embedding.", ".shared.")


def head_depth(names: Iterable[str]) -> int:
    """Depth of what comes after the last layer, whether there is anything or not: one more than there are layers."""
    return max(_numbers(names).values(), default=-1) + 2


def depth_of_parameters(names: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, int]:
    """Depth by name: 0 for embeddings, 1 and on for layers, one more than the last layer for what comes after them.

    Args:
        names: of all parameters of a model.
        embeddings: `Architecture.embeddings`, from `embeddings_of`.
    """
    top, parts = head_depth(names), (*_EMBEDDINGS, *embeddings)
    depths = {name: 0 if any(part in f".{name}" for part in parts) else top for name in names}
    return depths | {name: number + 1 for name, number in _numbers(names).items()}


def embeddings_of(module: nn.Module) -> tuple[str, ...]:
    """What the architecture of a model, or of the one in this module, counts to its embeddings besides the usual."""
    types = (part.config.model_type for part in module.modules() if isinstance(part, PreTrainedModel))
    architecture = ARCHITECTURES.get(next(types, ""))
    return () if architecture is None else architecture.embeddings


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
