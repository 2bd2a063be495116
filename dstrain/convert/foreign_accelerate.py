"""What `Accelerator.save_state` writes without ZeRO: whole weights by name, and an optimizer's state by number.

Which number is which parameter's is not in the file, unless the optimizer was built from named parameters. It follows
from how the groups were made; the usual ways are tried, and exactly one assignment has to fit every shape.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dstrain.checkpoint.fragments import WEIGHT
from dstrain.convert.foreign_piece import Foreign, ForeignPiece
from dstrain.convert.safe_load import load_tensors
from dstrain.errors import CheckpointError
from dstrain.optimizers.adamw import ADAM_STATES

OPTIMIZER = "optimizer.bin"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_NOT_DECAYED = ("bias", "layernorm", "layer_norm", "norm")
Names = list[str]


def is_saved_state(folder: Path) -> bool:
    """Whether a folder looks like one of `save_state`, or a part of one."""
    return any((folder / name).is_file() for name in (*_WEIGHTS, OPTIMIZER))


def open_saved_state(folder: Path, trained: dict[str, list[int]]) -> Foreign:
    """Open a folder of `save_state`.

    Args:
        folder: it holds the weights and `optimizer.bin`.
        trained: name → shape of the parameters that the recipe trains, in the model's order.

    Raises:
        CheckpointError: a file is missing or damaged, or the optimizer's states cannot be told apart.
    """
    weights = list(_weights(folder))
    if not (folder / OPTIMIZER).is_file():
        raise CheckpointError(
            f"{folder} has weights but no {OPTIMIZER}: there is nothing to resume from; start a new run from the "
            f"weights with model.pretrained"
        )
    if (folder / "optimizer_1.bin").exists() or (folder / "model_1.safetensors").exists():
        raise CheckpointError(f"{folder}: of several models or optimizers; one of each is imported")
    optimizer = load_tensors(folder / OPTIMIZER)
    if len(optimizer["state"]) > len(trained) or not _is_of(weights, trained):
        return _opened(weights, [], 0)  # of another model, as its weights show
    names = _names_by_number(folder / OPTIMIZER, optimizer, trained)
    moments, steps = [], set()
    for number, state in optimizer["state"].items():
        if missing := [moment for moment in ADAM_STATES if moment not in state]:
            raise CheckpointError(f"{folder / OPTIMIZER} has no {' and no '.join(missing)}: it is not Adam or AdamW")
        moments += [ForeignPiece.of(names[number], moment, state[moment]) for moment in ADAM_STATES]
        steps.add(int(state["step"]))
    if len(steps) != 1:
        raise CheckpointError(f"{folder / OPTIMIZER}: its states are of the steps {sorted(steps)}, not of one")
    return _opened(weights, moments, steps.pop())


def _is_of(weights: list[tuple[str, Tensor]], trained: dict[str, list[int]]) -> bool:
    """Whether some weights, buffers apart, can be those of the model. Their names may have a prefix."""
    shapes = {f".{name}": list(values.shape) for name, values in weights}
    return all(
        any(own.endswith(f".{name}") and shapes[own] == shape for own in shapes) for name, shape in trained.items()
    )


def _opened(weights: list[tuple[str, Tensor]], moments: list[ForeignPiece], step: int) -> Foreign:
    return Foreign(
        kind="an accelerate save_state folder",
        step=step,
        optimizer_steps=step,
        world_size=1,
        zero_stage=0,
        precision="fp32",
        shapes={name: list(values.shape) for name, values in weights},
        parts=[[ForeignPiece.of(name, WEIGHT, values) for name, values in weights], moments],
    )


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    single, index, pickled = (folder / name for name in _WEIGHTS)
    if single.is_file() or index.is_file():
        files = [single] if single.is_file() else [folder / name for name in _files_of(index)]
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; copy the whole folder again") from error
    elif pickled.is_file():
        yield from load_tensors(pickled).items()
    else:
        raise CheckpointError(
            f"{folder} has {OPTIMIZER} but no weights ({' or '.join(_WEIGHTS)}); copy the whole folder"
        )


def _files_of(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all(name == Path(name).name for name in names):
            return names
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise CheckpointError(f"{index} is not an index of safetensors files; copy the whole folder again")


def _names_by_number(path: Path, optimizer: dict[str, Any], trained: dict[str, list[int]]) -> dict[int, str]:
    """Which parameter each number of an optimizer's state stands for."""
    groups = optimizer["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        return dict(zip(numbers, (name for group in groups for name in group["param_names"]), strict=True))
    sizes = [len(group["params"]) for group in groups]
    if sum(sizes) != len(trained):
        raise CheckpointError(
            f"{path} has states of {sum(sizes)} parameters, the recipe trains {len(trained)}: it is of another model, "
            f"or other parameters were frozen"
        )
    elements = [optimizer["state"][n]["exp_avg"].numel() if n in optimizer["state"] else None for n in numbers]
    fitting = [
        order
        for ways in _usual_groups(trained)
        if [len(way) for way in ways] == sizes
        for order in [[name for way in ways for name in way]]
        if [math.prod(trained[name]) for name in order] == elements
    ]
    if len({tuple(order) for order in fitting}) != 1:
        why = "fits no usual way of making them" if not fitting else "may be of different parameters"
        raise CheckpointError(
            f"{path} does not name its parameters, and the order of its groups ({', '.join(map(str, sizes))} "
            f"parameters) {why}; build the optimizer from model.named_parameters(), which saves the names, load this "
            f"state into it, and save again"
        )
    return dict(zip(numbers, fitting[0], strict=True))


def _usual_groups(trained: dict[str, list[int]]) -> Iterator[list[Names]]:
    """The ways in which training scripts group parameters, each group in the model's order."""
    yield [list(trained)]
    matrices = [name for name, shape in trained.items() if len(shape) > 1]
    decayed = [name for name in trained if not any(part in name.lower() for part in _NOT_DECAYED)]
    for first in (matrices, decayed):
        rest = [name for name in trained if name not in set(first)]
        yield [first, rest]
        yield [rest, first]
