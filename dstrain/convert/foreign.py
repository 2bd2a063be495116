"""Checkpoints of other programs, as pieces of flat parameters: what `dstrain ckpt import` makes fragments of.

    native DeepSpeed ZeRO    TAG/[bf16_]zero_pp_rank_K_mp_rank_00_optim_states.pt of every rank K, and model states
    DeepSpeed universal      TAG/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt
    accelerate save_state    model.safetensors or pytorch_model.bin, and optimizer.bin; or the first of these inside

Tensors stay in their files until they are copied.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dstrain.convert.foreign_accelerate import is_saved_state, open_saved_state
from dstrain.convert.foreign_deepspeed import open_native, open_universal, zero_files
from dstrain.convert.foreign_piece import Foreign
from dstrain.errors import CheckpointError


def open_foreign(source: Path, trained: dict[str, list[int]]) -> Foreign:
    """Find out what a folder holds, and open it.

    Args:
        source: the folder that was saved into, or one checkpoint (a tag) in it.
        trained: name → shape of what the recipe trains, in the model's order: an optimizer's state without names is
            matched with it.

    Raises:
        CheckpointError: it holds nothing known, or something damaged, or what only arbitrary unpickling would read.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give the folder of a checkpoint")
    for folder in _candidates(source):
        if (folder / "zero").is_dir():
            return open_universal(folder)
        if zero_files(folder):
            return open_native(folder)
    if is_saved_state(source):
        return open_saved_state(source, trained)
    raise CheckpointError(
        f"{source} holds no checkpoint that can be imported: neither a DeepSpeed ZeRO checkpoint of stage 1, 2 or 3 "
        f"(*_optim_states.pt, or zero/ of a universal one) nor an accelerate save_state folder (model.safetensors and "
        f"optimizer.bin); give the folder that these lie in"
    )


def _candidates(source: Path) -> Iterable[Path]:
    """Where DeepSpeed's files may be: in the folder, in the tag that `latest` names, in Accelerate's subfolder."""
    yield source
    for name in ("latest", "latest_universal"):
        if (source / name).is_file():
            tag = (source / name).read_text(encoding="utf-8", errors="replace").strip()
            if not tag or tag != Path(tag).name or not (source / tag).is_dir():
                raise CheckpointError(
                    f"{source / name} names {tag!r}, which is no folder beside it; give the folder of a checkpoint"
                )
            yield source / tag
    yield source / "pytorch_model"


def renamed(foreign: Foreign, wanted: Iterable[str], aliases: dict[str, str]) -> Foreign:
    """The same with this model's names: a prefix that all names have (`module.`) goes, tied ones get their first name.

    Args:
        foreign: a checkpoint.
        wanted: the names of the model's parameters and buffers.
        aliases: tied name → first name of the same tensor.
    """
    prefix = _common_prefix(list(foreign.shapes), {*wanted, *aliases})
    stripped = {name: name.removeprefix(prefix) for name in foreign.shapes}
    names = {name: aliases.get(own, own) for name, own in stripped.items()}
    return replace(
        foreign,
        shapes={names[name]: shape for name, shape in foreign.shapes.items()},
        parts=[
            [replace(piece, parameter=names.get(piece.parameter, piece.parameter)) for piece in part]
            for part in foreign.parts
        ],
    )


def _common_prefix(names: list[str], known: set[str]) -> str:
    if any(name in known for name in names):
        return ""
    for prefix in {name.removesuffix(own) for name in names for own in known if name.endswith(f".{own}")}:
        if all(name.startswith(prefix) for name in names):
            return prefix
    return ""
