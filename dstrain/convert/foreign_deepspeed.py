"""DeepSpeed's checkpoints, native and universal.

Stages 1 and 2 lay the parameters of a group end to end and cut that line into one partition per rank; each rank's file
says which stretch of its partition is of which parameter. Stage 3 cuts every parameter by itself; a rank's partitions
of a group lie end to end, the last of each parameter padded.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.checkpoint.fragments import WEIGHT
from dstrain.convert.foreign_piece import Foreign, ForeignPiece
from dstrain.convert.safe_load import load_tensors
from dstrain.errors import CheckpointError
from dstrain.optimizers.adamw import ADAM_STATES

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_UNIVERSAL_STATES = {"fp32": WEIGHT, **{moment: moment for moment in ADAM_STATES}}


def zero_files(folder: Path) -> list[Path]:
    """The ranks' optimizer files in a folder, by rank."""
    return _by_rank(folder, _OPTIMIZER_FILE)


def open_native(folder: Path) -> Foreign:
    """A checkpoint that `engine.save_checkpoint` wrote under ZeRO 1, 2 or 3 on any number of ranks.

    Raises:
        CheckpointError: ranks are missing, or it is of model parallelism, or of an optimizer other than Adam(W).
    """
    files = zero_files(folder)
    ranks = [load_tensors(file)["optimizer_state_dict"] for file in files]
    stage, world_size = _stage(ranks[0]["zero_stage"]), _world_size(ranks[0]["partition_count"])
    if len(files) != world_size:
        raise CheckpointError(
            f"{folder}: optimizer states of {len(files)} ranks, but {world_size} saved it; copy the whole folder"
        )
    models = [load_tensors(file) for file in _by_rank(folder, _MODEL_FILE)]
    if len(models) != (world_size if stage == 3 else 1):
        raise CheckpointError(f"{folder}: {len(models)} model states of {world_size} ranks; copy the whole folder")
    pieces = _stage_3(ranks, models) if stage == 3 else _stages_1_and_2(folder, ranks)
    parts = list(pieces)
    parts[0] += _buffers(models[0])
    for rank, part in enumerate(parts):
        part += _frozen(models, rank, stage)
    return Foreign(
        kind=f"a DeepSpeed checkpoint of ZeRO stage {stage}, saved by {world_size} ranks",
        step=int(models[0]["global_steps"]),
        optimizer_steps=_adam_steps(folder, [_optimizer(rank) for rank in ranks]),
        world_size=world_size,
        zero_stage=stage,
        precision=_precision(models[0]),
        shapes=_shapes(models[0]),
        parts=parts,
    )


def open_universal(folder: Path) -> Foreign:
    """A checkpoint that DeepSpeed's `ds_to_universal` made of one.

    Raises:
        CheckpointError: files are missing, or it is of model parallelism.
    """
    models = [load_tensors(file) for file in _by_rank(folder, _MODEL_FILE)]
    if not models:
        raise CheckpointError(f"{folder}: zero/ is there, but no *_model_states.pt; copy the whole folder")
    parts, steps = [], set()
    for where in sorted({path.parent for path in (folder / "zero").rglob("fp32.pt")}):
        name = str(where.relative_to(folder / "zero"))
        if name in models[0]["shared_params"]:  # a tied one is there twice
            continue
        states = [(state, where / f"{file}.pt") for file, state in _UNIVERSAL_STATES.items()]
        parts.append([ForeignPiece.of(name, state, _universal_tensor(f)) for state, f in states if f.is_file()])
        if (where / "step.pt").is_file():
            steps.add(int(_universal_tensor(where / "step.pt")))
    if not parts:
        raise CheckpointError(f"{folder / 'zero'} holds no parameter; convert the checkpoint again")
    present = {part[0].parameter for part in parts}
    optimizer = load_tensors(folder / "zero" / "optimizer_state.pt")
    stage = _stage(optimizer["zero_stage"])
    rest = [piece for rank in range(len(models)) for piece in _frozen(models, rank, stage)]
    parts.append([*_buffers(models[0]), *(piece for piece in rest if piece.parameter not in present)])
    if not steps:
        inner = optimizer.get("optimizer_state_dict") or optimizer.get("base_optimizer_state") or {}
        steps = {int(s["step"]) for s in inner.get("state", {}).values()} or {_applied(models[0])}
    return Foreign(
        kind=f"a universal DeepSpeed checkpoint, made of one of ZeRO stage {stage}",
        step=int(models[0]["global_steps"]),
        optimizer_steps=max(steps),
        world_size=_world_size(optimizer["partition_count"]),
        zero_stage=stage,
        precision=_precision(models[0]),
        shapes={**dict.fromkeys(present), **_shapes(models[0])},
        parts=[part for part in parts if part],
    )


# ---------------------------------------------------------------- where DeepSpeed puts what


def _stages_1_and_2(folder: Path, ranks: list[dict[str, Any]]) -> Iterator[list[ForeignPiece]]:
    reached: dict[str, int] = defaultdict(int)  # elements of each parameter that lower ranks have
    for rank in ranks:
        if "param_slice_mappings" not in rank:
            raise CheckpointError(
                f"{folder} does not say where its parameters lie (param_slice_mappings): it is of a DeepSpeed before "
                f"0.8; load and save it once with a newer one"
            )
        part = []
        state = _optimizer(rank)["state"]
        weights = rank["single_partition_of_fp32_groups"]
        for group, (weight, mapping) in enumerate(zip(weights, rank["param_slice_mappings"], strict=True)):
            lines = {WEIGHT: weight, **_moments(folder, state, group)}
            for name, address in mapping.items():
                stretch = slice(address.start, address.start + address.numel)
                part += [ForeignPiece.of(name, kind, line[stretch], reached[name]) for kind, line in lines.items()]
                reached[name] += address.numel
        yield part


def _stage_3(ranks: list[dict[str, Any]], models: list[dict[str, Any]]) -> Iterator[list[ForeignPiece]]:
    """A parameter group may lie in several flat groups, its partitions end to end over them."""
    world_size = len(ranks)
    names = [(name, int(shape.numel())) for group in models[0]["param_shapes"] for name, shape in group.items()]
    for index, rank in enumerate(ranks):
        inner = rank["optimizer_state_dict"]
        groups = [
            {WEIGHT: weight, **_moments(None, inner["state"], group)}
            for group, weight in enumerate(rank["fp32_flat_groups"])
        ]
        part, waiting, start = [], iter(groups), 0
        lines = next(waiting)
        for name, numel in names:
            partition = -(-numel // world_size)
            if start + partition > lines[WEIGHT].numel():
                lines, start = next(waiting), 0
            own = max(0, min(partition, numel - index * partition))
            part += [
                ForeignPiece.of(name, kind, line[start : start + own], index * partition)
                for kind, line in lines.items()
                if own
            ]
            start += partition
        yield part


def _moments(folder: Path | None, state: dict[int, dict[str, Any]], group: int) -> dict[str, Tensor]:
    found = state.get(group, {})
    if missing := [moment for moment in ADAM_STATES if moment not in found]:
        raise CheckpointError(
            f"{folder or 'the checkpoint'}: its optimizer has no {' and no '.join(missing)}: it is not Adam or AdamW, "
            f"or made no step"
        )
    return {moment: found[moment] for moment in ADAM_STATES}


def _optimizer(rank: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the optimizer that ZeRO wraps."""
    inner = rank.get("base_optimizer_state", rank.get("optimizer_state_dict"))
    if not isinstance(inner, dict) or "state" not in inner:
        raise CheckpointError("an elastic DeepSpeed checkpoint; save it without `elastic_checkpoint`, or convert it")
    return inner


def _adam_steps(folder: Path, optimizers: list[dict[str, Any]]) -> int:
    steps = {int(state["step"]) for inner in optimizers for state in inner["state"].values()}
    if len(steps) != 1:
        raise CheckpointError(f"{folder}: its optimizer states are of the steps {sorted(steps)}, not of one")
    return steps.pop()


def _buffers(model: dict[str, Any]) -> list[ForeignPiece]:
    module = model["module"]
    return [ForeignPiece.of(name, WEIGHT, module[name]) for name in model["buffer_names"]]


def _frozen(models: list[dict[str, Any]], rank: int, stage: int) -> list[ForeignPiece]:
    """Parameters that were not trained: whole in stages 1 and 2, each rank's partition in stage 3."""
    if stage != 3:
        module = models[0]["module"]
        return [ForeignPiece.of(name, WEIGHT, module[name]) for name in _frozen_shapes(models[0])] if rank == 0 else []
    pieces = []
    for name, shape in _frozen_shapes(models[0]).items():
        start, numel = rank * -(-math.prod(shape) // len(models)), math.prod(shape)
        values = models[rank]["frozen_param_fragments"][name]
        own = min(values.numel(), numel - start)
        pieces += [ForeignPiece.of(name, WEIGHT, values[:own], start)] if own > 0 else []
    return pieces


def _frozen_shapes(model: dict[str, Any]) -> dict[str, list[int]]:
    """Stages 1 and 2 do not list them: they are what is neither trained, nor tied to another, nor a buffer."""
    if model.get("frozen_param_shapes"):
        return {name: list(shape) for name, shape in model["frozen_param_shapes"].items()}
    others = {name for group in model["param_shapes"] for name in group}
    others |= {*model["shared_params"], *model["buffer_names"]}
    return {name: list(values.shape) for name, values in model["module"].items() if name not in others}


def _shapes(model: dict[str, Any]) -> dict[str, list[int] | None]:
    trained = {name: list(shape) for group in model["param_shapes"] for name, shape in group.items()}
    return {**trained, **_frozen_shapes(model), **{n: list(model["module"][n].shape) for n in model["buffer_names"]}}


def _universal_tensor(path: Path) -> Tensor:
    content = load_tensors(path)
    tensor = content["param"] if isinstance(content, dict) else content
    assert isinstance(tensor, Tensor), f"{path}: {type(tensor)}"
    return tensor


def _applied(model: dict[str, Any]) -> int:
    return int(model["global_steps"]) - int(model["skipped_steps"])


def _precision(model: dict[str, Any]) -> str:
    config = model.get("ds_config")
    return "bf16" if isinstance(config, dict) and config.get("bf16", {}).get("enabled") else "fp32"


def _stage(value: Any) -> int:
    """From an enumeration's stand-in, or a number as older versions have it."""
    return int(value.values[0] if hasattr(value, "values") else value)


def _world_size(partitions: Any) -> int:
    return max(partitions) if isinstance(partitions, list) else int(partitions)


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        if match := pattern.fullmatch(path.name):
            if int(match[2]):
                raise CheckpointError(f"{path}: a checkpoint of model parallelism; only data parallelism is imported")
            found.append((int(match[1] or 0), path))
    return [path for _, path in sorted(found)]
