"""Reading other programs' pickles without running anything in them.

`torch.load(weights_only=True)` builds tensors, containers and numbers, and calls nothing that is not on a list. What
DeepSpeed puts beside them is listed here, each name with a harmless stand-in: no code of DeepSpeed is looked up by a
file's wish, and none has to be installed. A file that names anything else is refused, not read in part.
"""

import argparse
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dstrain.errors import CheckpointError


class PlainData:
    """Stands for an object whose class is not wanted: takes what the pickle says of it, and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class FragmentAddress(PlainData):
    """DeepSpeed's `fragment_address`: `numel` elements of a flat buffer from `start` on."""

    numel: int
    start: int


_STAND_INS: dict[str, type] = {
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": PlainData,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": PlainData,
    "deepspeed.runtime.zero.config.ZeroStageEnum": PlainData,  # its value is in .values
    "deepspeed.utils.types.ActivationFuncType": PlainData,
    "argparse.Namespace": argparse.Namespace,  # Megatron's arguments
}


def load_tensors(path: Path) -> Any:
    """The content of a file of torch.save, its tensors memory-mapped where the file allows that.

    Raises:
        CheckpointError: it is missing, damaged, or names a class or function that is not on the list.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            if unknown := _unknown_names(path):
                raise _refusal(path, unknown)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the whole folder of the checkpoint") from None
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if asked_for := re.findall(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(path, asked_for) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}; it is damaged, or not of torch.save") from error


def _refusal(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is not read: it asks for {', '.join(names)}, and loading that would run code that comes with the "
        f"file. Load it where you trust it, keep only tensors, numbers and containers, and save that with torch.save"
    )


def _unknown_names(path: Path) -> list[str]:
    """Classes and functions that a file asks for and that nobody allowed."""
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) if _is_zip(path) else []


def _is_zip(path: Path) -> bool:
    """Whether a file is of torch.save's present form, which alone can be mapped and searched for names."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
