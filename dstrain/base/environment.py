"""The one module that reads and sets environment variables; everybody else asks it, by what a variable means.

Children get a copy (`for_child`). What goes into a run's records is an allow-list (`recordable`): a variable that
nobody here has thought of may hold anything, a secret too.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dstrain.errors import UserError

REDACTED = "(redacted)"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # the network devices that libraries are told to use

# Before numpy and tokenizers are imported by a process that has a core, or a part of one, to itself.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# What decides how an attempt runs: where programs and libraries are found, ranks, devices, threads, networks.
_RECORDED = frozenset(
    {
        *("PATH", "PWD", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUNBUFFERED"),
        *("PYTHONNOUSERSITE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"),
        *("TOKENIZERS_PARALLELISM", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT"),
    }
)
_RECORDED_FAMILIES = (
    *("LC_", "DSTRAIN_", "SLURM_", "TORCH_", "TORCHELASTIC_", "PYTORCH_", "TRITON_", "DS_", "DEEPSPEED_"),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "ROCR_", "HIP_", "OMP_", "MKL_", "OPENBLAS_", "KMP_"),
    *("ACCELERATE_", "TRANSFORMERS_", "MALLOC_"),
)
_SECRET_NAME = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|KEY|CREDENTIAL", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


@dataclass(frozen=True)
class RankVariables:
    """Which process of a job this one is, as torchrun and SLURM's launchers tell it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def read(cls) -> "RankVariables | None":
        """None where RANK is not set: nobody started this process as a rank. Without the others it is alone.

        Raises:
            UserError: one of them is no number.
        """
        if "RANK" not in os.environ:
            return None
        world_size = _count("WORLD_SIZE", 1)
        return cls(_count("RANK", 0), world_size, _count("LOCAL_RANK", 0), _count("LOCAL_WORLD_SIZE", world_size))

    @classmethod
    def require(cls) -> "RankVariables":
        """The same. Raises UserError where RANK is not set."""
        variables = cls.read()
        if variables is None:
            raise UserError(
                "RANK is not set: start ranks through `dstrain run` or torchrun; RANK=0 WORLD_SIZE=1 for a single one"
            )
        return variables


def _count(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment: it has to be a number from 0; a launcher sets it")
    return int(value)


def variables() -> Mapping[str, str]:
    """All variables of this process, to look at."""
    return MappingProxyType(os.environ)


def for_child(added: Mapping[str, str] | None = None, *, without: str | tuple[str, ...] = ()) -> dict[str, str]:
    """The environment of a process that is started from here.

    Args:
        added: variables beside those of this process, which they override.
        without: how the names begin of those that are left out.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    return kept | dict(added or {})


def set_defaults(defaults: Mapping[str, str]) -> None:
    """Set the variables that are not set yet, for libraries and children of this process."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def override(values: Mapping[str, str]) -> None:
    """Set variables, whatever they were."""
    os.environ.update(values)


def slurm_job() -> str | None:
    """The number of the SLURM job that this process runs in."""
    return os.environ.get("SLURM_JOB_ID")


def slurm_nodes() -> str:
    """The nodes of the SLURM job that this process runs in, in SLURM's notation. Raises UserError outside of a job."""
    try:
        return os.environ["SLURM_JOB_NODELIST"]
    except KeyError:
        raise UserError("SLURM_JOB_NODELIST is not set: this is no SLURM job; start it with sbatch or salloc") from None


def cache_home() -> Path | None:
    """The user's cache folder, by the XDG specification; None for a user without a home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():  # else it does not count, says the specification
        return folder
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def working_folder() -> Path:
    """The current folder, with its name as the shell has it where that leads to the same place."""
    named = Path(os.environ.get("PWD", "."))
    return named if named.is_absolute() and named.exists() and named.samefile(".") else Path.cwd()


def interface_names() -> dict[str, str]:
    """The network devices that Gloo and NCCL are told to use, by variable."""
    return {name: os.environ[name] for name in INTERFACES if name in os.environ}


def visible_devices() -> list[str] | None:
    """The CUDA devices that this process is limited to; None without a limit."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if chosen is None else [device for device in chosen.split(",") if device]


def flight_recorder_pipes() -> str | None:
    """How the names of the pipes begin through which NCCL's flight recorder is asked to write."""
    return os.environ.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE")


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is likely to hold a secret."""
    return _SECRET_NAME.search(name) is not None


def recordable(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment may stand in a record, sorted: the variables that decide how a run goes, and no others.

    Of those, values whose name says that they are secret are replaced, and user names and passwords within URLs.
    """
    return {
        name: REDACTED if is_secret_name(name) else _PASSWORD_IN_URL.sub(REDACTED, value)
        for name, value in sorted(environment.items())
        if name in _RECORDED or name.startswith(_RECORDED_FAMILIES)
    }
