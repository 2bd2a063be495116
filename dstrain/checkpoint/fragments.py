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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dstrain.model.lora import has_adapters
from dstrain.runtime.runtime import Runtime

WEIGHT = "weight"
Piece = tuple[str, Tensor]  # (key, 1-D tensor), as a file holds it
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's states of the parameter's shape


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

    def pieces(self, states: Sequence[str] = (WEIGHT, *MOMENTS)) -> Iterator[Piece]:
        """(key, 1-D tensor) of what this rank saves of the fragment: those of these states that it has."""
        start, stop = self.owned
        if start < stop:
            for state in states:
                if (view := self.states.get(state)) is not None:
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
    """The state of this rank: trained parameters with their moments; frozen ones and persistent buffers without.

    The frozen base of adapters is no state: it is built again.

    Creates moments (zeros, as before the first step) that the optimizer has not made yet.
    """
    inner = runtime.inner_optimizer
    homes = {id(home.parameter): home for home in _homes(runtime)}
    fragments = []
    for name, parameter in saved_parameters(model).items():
        if not parameter.requires_grad:
            fragments.append(_frozen_fragment(name, parameter, runtime))
        elif (home := homes.get(id(parameter))) is not None and home.numel:
            stretch = slice(home.start, home.start + home.numel)
            states = {WEIGHT: home.stepped, **_moments(inner, home.stepped)}
            views = {state: tensor.detach().view(-1)[stretch] for state, tensor in states.items()}
            whole = (home.offset, home.offset + home.numel)
            owned = share(home.numel, runtime.rank, runtime.world_size) if home.replicated else whole
            fragments.append(Fragment(name, home.offset, home.numel, owned, views))
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
def publish(runtime: Runtime, applied_steps: int) -> None:
    """Make what was copied into the fragments take effect: model weights follow the fp32 masters, Adam its step count.

    A collective call: stages 1 and 2 gather the weights at once, stage 3 in the next forward pass.
    """
    optimizer = runtime.engine.optimizer
    runtime.applied_steps = applied_steps
    runtime.count_steps()
    stage = runtime.recipe.train.zero.stage
    if stage == 3:
        # Small "persistent" parameters stay gathered between steps; released, the next forward gathers them afresh.
        optimizer._partition_all_parameters()
        low_groups, full_groups = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
        for low, full in zip(low_groups, full_groups, strict=True):
            low.data.copy_(full.data)
    elif stage in (1, 2):
        optimizer.update_lp_params()
    elif runtime.recipe.train.precision == "bf16":
        for low_group, full_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, full in zip(low_group, full_group, strict=True):
                low.copy_(full)


# ------------------------------------------------------------------ where DeepSpeed keeps what


@dataclass(frozen=True)
class _Home:
    """`numel` elements of `parameter` from `offset` on are elements from `start` on of the tensor that is stepped."""

    parameter: Tensor
    stepped: Tensor  # fp32; the key under which the inner optimizer keeps its moments
    start: int
    offset: int
    numel: int
    replicated: bool


def _homes(runtime: Runtime) -> Iterator[_Home]:
    optimizer, stage = runtime.engine.optimizer, runtime.recipe.train.zero.stage
    if stage == 3:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for parameter in group:
                partition = parameter.partition_numel()
                offset, numel = _partition(parameter.ds_numel, partition, runtime.rank)
                yield _Home(parameter, flat, start, offset, numel, replicated=False)
                start += partition
    elif stage in (1, 2):
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    start, offset = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
                    numel = mapping.hp_fragment_address.numel
                    yield _Home(parameter, flat, start, offset, numel, replicated=False)
    else:
        fp32 = runtime.recipe.train.precision == "fp32"
        low_groups = [group["params"] for group in optimizer.param_groups] if fp32 else optimizer.fp16_groups
        full_groups = low_groups if fp32 else optimizer.fp32_groups
        for low_group, full_group in zip(low_groups, full_groups, strict=True):
            for low, full in zip(low_group, full_group, strict=True):
                yield _Home(low, full, 0, 0, full.numel(), replicated=True)


def _partition(numel: int, partition: int, rank: int) -> tuple[int, int]:
    """(offset, numel) of a rank's stage-3 partition without the padding at the parameter's end."""
    offset = min(rank * partition, numel)
    return offset, min(partition, numel - offset)


def _moments(inner: torch.optim.Optimizer, stepped: Tensor) -> dict[str, Tensor]:
    state: dict[str, Any] = inner.state[stepped]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=stepped.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(stepped, requires_grad=False)
    return {moment: state[moment] for moment in MOMENTS}


def _frozen_fragment(name: str, parameter: Any, runtime: Runtime) -> Fragment:
    if not hasattr(parameter, "ds_tensor"):
        return _replicated(name, parameter, runtime)
    partition = parameter.ds_tensor.ds_numel
    offset, numel = _partition(parameter.ds_numel, partition, runtime.rank)
    view = parameter.ds_tensor.detach().view(-1)[:numel]
    return Fragment(name, offset, numel, (offset, offset + numel), {WEIGHT: view})


def _replicated(name: str, tensor: Tensor, runtime: Runtime) -> Fragment:
    owned = share(tensor.numel(), runtime.rank, runtime.world_size)
    return Fragment(name, 0, tensor.numel(), owned, {WEIGHT: tensor.detach().view(-1)})
