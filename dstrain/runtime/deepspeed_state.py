"""Where DeepSpeed keeps weights and optimizer states, by ZeRO stage. No other module of the package knows.

    stage 0, fp32   the optimizer's parameters are the model's
    stage 0, bf16   `fp16_groups` (the model's) and `fp32_groups` (which are stepped), parameter by parameter
    stage 1, 2      `bit16_groups` (the model's); `single_partition_of_fp32_groups` (stepped): one flat tensor a group,
                    this rank's; a parameter's `_hp_mapping` says which part of it is in there, if any
    stage 3         `fp16_groups` (the model's, each with `ds_numel`, `ds_shape`, `ds_tensor`), and
                    `fp32_partitioned_groups_flat` (stepped): this rank's parts of them, end to end

None of it is documented: DeepSpeed's own checkpoints are whole files of one stage and one number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.insides import inside, library_error

_SAVING = "finding weights and optimizer states for checkpoints"
_LOADING = "loading weights"


@dataclass(frozen=True)
class ShardLocation:
    """`numel` elements of `parameter` from `offset` on are elements from `start` on of the tensor that is stepped.

    `is_replicated`: every rank has the same.
    """

    parameter: Tensor
    stepped: Tensor  # fp32; the key under which the inner optimizer keeps its states
    start: int
    offset: int
    numel: int
    is_replicated: bool


def shard_locations(optimizer: Any, stage: int, precision: str, rank: int) -> Iterator[ShardLocation]:
    """Each trained parameter of which this rank has something, or nothing but a place for it (`numel` 0).

    Args:
        optimizer: DeepSpeed's.
        stage: of ZeRO.
        precision: "fp32" or "bf16".
        rank: this one.

    Raises:
        LibraryError: this DeepSpeed keeps them otherwise.
    """
    if stage == 3:
        flat_groups = inside(optimizer, "fp32_partitioned_groups_flat", _SAVING)
        for group, flat in zip(inside(optimizer, "fp16_groups", _SAVING), flat_groups, strict=True):
            start = 0
            for parameter in group:
                partition = inside(parameter, "partition_numel", _SAVING)()
                offset, numel = unpadded(inside(parameter, "ds_numel", _SAVING), partition, rank)
                yield ShardLocation(parameter, flat, start, offset, numel, is_replicated=False)
                start += partition
    elif stage in (1, 2):
        flat_groups = inside(optimizer, "single_partition_of_fp32_groups", _SAVING)
        for group, flat in zip(inside(optimizer, "bit16_groups", _SAVING), flat_groups, strict=True):
            for parameter in group:
                mapping = inside(parameter, "_hp_mapping", _SAVING)
                if mapping is not None:
                    stepped = inside(mapping, "hp_fragment_address", _SAVING)
                    offset = inside(mapping, "lp_fragment_address", _SAVING).start
                    yield ShardLocation(parameter, flat, stepped.start, offset, stepped.numel, is_replicated=False)
    else:
        for low, full in _whole_parameters(optimizer, precision, _SAVING):
            yield ShardLocation(low, full, 0, 0, full.numel(), is_replicated=True)


def _whole_parameters(optimizer: Any, precision: str, use: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Without ZeRO: the model's parameters, and what is stepped for each of them."""
    if precision == "fp32":
        for group in optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)
        return
    low_groups, full_groups = inside(optimizer, "fp16_groups", use), inside(optimizer, "fp32_groups", use)
    for low_group, full_group in zip(low_groups, full_groups, strict=True):
        yield from zip(low_group, full_group, strict=True)


def sync_model_weights(optimizer: Any, stage: int, precision: str) -> None:
    """Have the model's weights follow the fp32 weights that are stepped. A collective call.

    Stages 1 and 2 gather the weights at once, stage 3 in the next forward pass.
    """
    if stage == 3:
        # Small "persistent" parameters stay gathered between steps; released, the next forward gathers them afresh.
        inside(optimizer, "_partition_all_parameters", _LOADING)()
        low_groups = inside(optimizer, "fp16_partitioned_groups_flat", _LOADING)
        full_groups = inside(optimizer, "fp32_partitioned_groups_flat", _LOADING)
        for low, full in zip(low_groups, full_groups, strict=True):
            low.data.copy_(full.data)
    elif stage in (1, 2):
        inside(optimizer, "update_lp_params", _LOADING)()
    elif precision == "bf16":
        for low, full in _whole_parameters(optimizer, precision, _LOADING):
            low.copy_(full)


def stepped_tensors(optimizer: Any, stage: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each tensor that the inner optimizer steps, after its parameter group."""
    if stage == 3:  # its groups are filled for the time of a step only
        group_numbers = inside(optimizer, "sub_group_to_group_id", _SAVING)
        for number, stepped in enumerate(inside(optimizer, "fp32_partitioned_groups_flat", _SAVING)):
            yield optimizer.param_groups[group_numbers[number]], stepped
    else:
        for group in optimizer.param_groups:
            for stepped in group["params"]:
                yield group, stepped


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, which DeepSpeed wraps, except in fp32 without ZeRO."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def whole_shape(tensor: Tensor) -> list[int]:
    """The shape of a parameter, which under stage 3 is empty itself."""
    return list(getattr(tensor, "ds_shape", tensor.shape))


def local_partition(parameter: Tensor, rank: int) -> tuple[int, Tensor] | None:
    """Under stage 3 where this rank's part of a parameter begins, and the part, 1-D, without padding; else None."""
    partition = partition_tensor(parameter)
    if partition is None:
        return None
    size = inside(partition, "ds_numel", _SAVING)
    offset, numel = unpadded(inside(parameter, "ds_numel", _SAVING), size, rank)
    return offset, partition.detach().view(-1)[:numel]


def partition_tensor(parameter: Tensor) -> Tensor | None:
    """Under stage 3 the memory of this rank's part of a parameter, else None."""
    partition: Tensor | None = getattr(parameter, "ds_tensor", None)
    return partition


def unpadded(numel: int, partition: int, rank: int) -> tuple[int, int]:
    """(offset, numel) of a rank's stage-3 partition without the padding at the parameter's end."""
    offset = min(rank * partition, numel)
    return offset, min(partition, numel - offset)


def use_faster_overflow_check(optimizer: Any) -> None:
    """Without ZeRO in bf16, where DeepSpeed asks of every gradient for its maximum and its minimum.

    A sum, in a third of the time, has it all.
    """
    checker = inside(optimizer, "overflow_checker", "a faster check of gradients")
    inside(checker, "_has_inf_or_nan", "a faster check of gradients")
    checker._has_inf_or_nan = lambda gradient, _number: not torch.isfinite(gradient.sum())


def skip_all_reduce(engine: Any) -> None:
    """For one rank without ZeRO, which would copy all gradients away and back."""
    inside(engine, "enable_backward_allreduce", "sparing one rank its collectives")
    engine.enable_backward_allreduce = False


def require_layout(engine: Any, stage: int, precision: str, rank: int) -> int:
    """Look whether the prepared engine keeps everything as this module has it.

    Returns:
        The elements of trained parameters that this rank has; together the ranks have to have all of them.

    Raises:
        LibraryError: it does not.
    """
    optimizer, elements = engine.optimizer, 0
    stepped_ones = {id(stepped) for _, stepped in stepped_tensors(optimizer, stage)}
    for location in shard_locations(optimizer, stage, precision, rank):
        stepped, stop = location.stepped, location.start + location.numel
        is_whole = location.is_replicated or location.offset + location.numel <= _elements(location.parameter)
        if id(stepped) not in stepped_ones or stepped.dtype != torch.float32 or stop > stepped.numel() or not is_whole:
            raise library_error("deepspeed", f"keeps other tensors under ZeRO stage {stage} in {precision}", _SAVING)
        elements += location.numel
    if stage == 3:
        for name in ("_partition_all_parameters", "fp16_partitioned_groups_flat"):
            inside(optimizer, name, _LOADING)
        for parameter in engine.module.parameters():
            for name in ("ds_shape", "ds_numel", "ds_tensor"):
                inside(parameter, name, _SAVING)
            inside(parameter.ds_tensor, "ds_numel", _SAVING)
    elif stage in (1, 2):
        inside(optimizer, "update_lp_params", _LOADING)
    for name in ("overflow", "_global_grad_norm"):  # which the engine takes from whichever optimizer has them
        inside(optimizer, name, "steps that were not applied, and the gradient norm")
    return elements


def trained_elements(engine: Any) -> int:
    """Elements of all trained parameters of the engine's model."""
    return sum(_elements(parameter) for parameter in engine.module.parameters() if parameter.requires_grad)


def _elements(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
