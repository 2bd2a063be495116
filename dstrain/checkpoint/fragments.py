"""Fragments: the one form in which training state exists on disk, whatever the ZeRO stage and the number of ranks.

A parameter, flattened, is a line of numbers. Of its fp32 weights and of each optimizer state every rank holds some
stretch, and which one depends on stage and world size:

    stage 0      every parameter whole, on every rank
    stage 1, 2   the parameters of a group laid end to end, that line cut into one partition per rank
    stage 3      each parameter cut into one partition per rank, the last one padded

`resident_fragments` describes these stretches as views of the optimizer's own memory. That is all that saving and
loading have to know: a rank saves what it owns under `<parameter>|<state>|<first element>`, and a rank that loads
copies into each of its stretches whatever saved pieces overlap it. No stage ever meets another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dstrain.errors import CheckpointError
from dstrain.model.lora import has_adapters
from dstrain.runtime import deepspeed_state
from dstrain.runtime.deepspeed_state import local_partition, shard_locations
from dstrain.runtime.runtime import Runtime

WEIGHT = "weight"
Piece = tuple[str, Tensor]  # (key, 1-D tensor), as a file holds it


@dataclass(frozen=True)
class Fragment:
    """Elements `offset` to `offset + numel` of one flattened parameter, resident on this rank.

    `owned` [start, stop), also counted in the parameter, is what this rank saves of it: everything where state is
    partitioned, an equal share where every rank holds the same.
    """

    parameter: str
    offset: int
    numel: int
    owned: tuple[int, int]
    states: dict[str, Tensor]  # state → 1-D view of `numel` elements

    def pieces(self, *, weights: bool = True, optimizer: bool = True) -> Iterator[Piece]:
        """(key, 1-D tensor) of what this rank saves of the fragment: its weights, its optimizer states, or both."""
        start, stop = self.owned
        if start < stop:
            for state, view in self.states.items():
                if weights if state == WEIGHT else optimizer:
                    yield fragment_key(self.parameter, state, start), view[start - self.offset : stop - self.offset]


def fragment_key(parameter: str, state: str, offset: int) -> str:
    """Name of a saved piece that begins at element `offset` of the flattened parameter."""
    return f"{parameter}|{state}|{offset}"


def parse_fragment_key(key: str) -> tuple[str, str, int]:
    """Inverse of `fragment_key`."""
    parameter, state, offset = key.rsplit("|", 2)
    return parameter, state, int(offset)


def share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The share [start, stop) of `numel` elements that is `rank`'s; shares differ by one element at most."""
    return rank * numel // world_size, (rank + 1) * numel // world_size


def overlap(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The common part [start, stop) of two stretches; empty if start >= stop."""
    return max(first[0], second[0]), min(first[1], second[1])


def resident_fragments(runtime: Runtime, model: PreTrainedModel) -> list[Fragment]:
    """The state of this rank: weights, persistent buffers, and the optimizer states of what is trained.

    The frozen base of adapters is no state: it is built again.

    Makes optimizer states (as before the first step) that are not there yet.
    """
    train, optimizer = runtime.recipe.train, runtime.engine.optimizer
    located = shard_locations(optimizer, train.zero.stage, train.precision, runtime.rank)
    locations = {id(location.parameter): location for location in located}
    fragments = []
    for name, parameter in saved_parameters(model).items():
        if not parameter.requires_grad:
            fragments.append(_frozen_fragment(name, parameter, runtime))
        elif (location := locations.get(id(parameter))) is not None and location.numel:
            flat_range = slice(location.start, location.start + location.numel)
            states = {WEIGHT: location.stepped, **_optimizer_states(runtime, location.stepped)}
            views = {state: tensor.detach().view(-1)[flat_range] for state, tensor in states.items()}
            whole = (location.offset, location.offset + location.numel)
            owned = share(location.numel, runtime.rank, runtime.world_size) if location.is_replicated else whole
            fragments.append(Fragment(name, location.offset, location.numel, owned, views))
    fragments += [_replicated(name, buffer, runtime) for name, buffer in persistent_buffers(model)]
    return fragments


def persistent_buffers(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Buffers that belong to a model's state; others are computed anew when it is built."""
    persistent = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]


def saved_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name → parameter of those that a checkpoint holds: all but the frozen base of adapters.

    Tied parameters come once, under their first name.
    """
    without_base = has_adapters(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad or not without_base}


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name → tensor of all that a checkpoint holds of a model."""
    return {**saved_parameters(model), **dict(persistent_buffers(model))}


@torch.no_grad()
def sync_model_weights(runtime: Runtime, applied_steps: int) -> None:
    """Make what was copied into the fragments take effect: the model's weights follow, and the optimizer's step count.

    A collective call.
    """
    train = runtime.recipe.train
    runtime.applied_steps = applied_steps
    runtime.count_steps()
    deepspeed_state.sync_model_weights(runtime.engine.optimizer, train.zero.stage, train.precision)


def _optimizer_states(runtime: Runtime, stepped: Tensor) -> dict[str, Tensor]:
    """The states of a tensor that is stepped, made where the optimizer has not made them yet.

    Raises:
        CheckpointError: it keeps others than its file declares, or of other sizes: saved, they would be lost.
    """
    declared = runtime.optimizer
    state: dict[str, Any] = runtime.inner_optimizer.state[stepped]
    if not state:
        state.update(declared.new_states(stepped))
    for name, value in state.items():
        is_cut = isinstance(value, Tensor) and value.numel() == stepped.numel() and name in declared.states
        if name != "step" and not is_cut:
            raise CheckpointError(
                f"optimizer.name={runtime.recipe.optimizer.name} keeps a state {name} of {_size(value)} for a tensor "
                f"of {stepped.numel():,} elements; a checkpoint holds the states {', '.join(declared.states)}, "
                f"with an element for each of the parameter's; correct the optimizer's `states`, or use another one"
            )
    return {name: state[name] for name in declared.states}


def _size(value: object) -> str:
    return f"{value.numel():,} elements" if isinstance(value, Tensor) else type(value).__name__


def _frozen_fragment(name: str, parameter: Tensor, runtime: Runtime) -> Fragment:
    partition = local_partition(parameter, runtime.rank)
    if partition is None:
        return _replicated(name, parameter, runtime)
    offset, view = partition
    return Fragment(name, offset, view.numel(), (offset, offset + view.numel()), {WEIGHT: view})


def _replicated(name: str, tensor: Tensor, runtime: Runtime) -> Fragment:
    owned = share(tensor.numel(), runtime.rank, runtime.world_size)
    return Fragment(name, 0, tensor.numel(), owned, {WEIGHT: tensor.detach().view(-1)})
