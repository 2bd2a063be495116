"""Known causes of failure, really brought about in a rank: what the libraries say then is their own."""

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from dstrain.proof.fault_entry import private_mounts

SMALL_BYTES = 1 << 16


def occupied_port(run_dir: Path) -> None:
    import torch.distributed as dist

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        os.environ["MASTER_PORT"] = str(other.getsockname()[1])
        dist.init_process_group("gloo")


def gloo_timeout(run_dir: Path) -> None:
    """Rank 1 does not come."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    dist.barrier()
    if os.environ["RANK"] == "0":
        group = dist.group.WORLD
        assert group is not None
        group.allreduce(torch.ones(1), timeout=timedelta(seconds=1)).wait()
    time.sleep(60)


def full_disk(run_dir: Path) -> None:
    folder = _small_disk(run_dir / "small")
    (folder / "file").write_bytes(bytes(2 * SMALL_BYTES))


def full_shared_memory(run_dir: Path) -> None:
    _small_disk(Path("/dev/shm"))
    import torch

    torch.zeros(SMALL_BYTES).share_memory_()


def shared_memory_bus_error(run_dir: Path) -> None:
    """Many programs do not reserve what they map, and find out when they write."""
    _small_disk(Path("/dev/shm"))
    from multiprocessing import shared_memory

    memory = shared_memory.SharedMemory(create=True, size=2 * SMALL_BYTES)
    memory.buf[:] = bytes(2 * SMALL_BYTES)


def missing_module(run_dir: Path) -> None:
    importlib.import_module("a_module_that_nobody_has")


def missing_library(run_dir: Path) -> None:
    import ctypes

    ctypes.CDLL("libnobodyhasit.so.7")


def mismatched_version(run_dir: Path) -> None:
    """An older package is found first, as with a stray PYTHONPATH."""
    folder = run_dir / "stray"
    old = folder / "tokenizers-0.1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.1.0\n")
    sys.path.insert(0, str(folder))
    importlib.import_module("transformers")


def _small_disk(folder: Path) -> Path:
    """A real one, that only this rank sees."""
    import ctypes

    folder.mkdir(exist_ok=True)
    private_mounts()
    options = f"size={SMALL_BYTES}".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", ctypes.c_ulong(0), options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    return folder


CAUSES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        occupied_port,
        gloo_timeout,
        full_disk,
        full_shared_memory,
        shared_memory_bus_error,
        missing_module,
        missing_library,
        mismatched_version,
    )
}
