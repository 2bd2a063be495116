"""NCCL's flight recorder: the last collectives of each rank, kept by torch in memory, written when a run hangs.

torch writes `nccl/rank-K` into the attempt's folder when a collective times out, or when something is written into the
rank's pipe; it is a pickle for `python -m torch.distributed.flight_recorder.fr_trace`.
"""

import contextlib
import os
from pathlib import Path

COLLECTIVES = 2000  # that each rank keeps


def recorder_environment(attempt_folder: Path, pipes: Path) -> dict[str, str]:
    """What ranks need in their environment. `pipes`: a folder of this machine; not every file system has pipes."""
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(COLLECTIVES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(attempt_folder.resolve() / "nccl" / "rank-"),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(pipes / "rank-"),
    }


def have_recorded(stem: str | None, rank: int) -> bool:
    """Ask a rank to write what it has recorded; whether it listens. `stem`: how the names of the pipes begin."""
    if stem is None:
        return False
    with contextlib.suppress(OSError):  # no pipe, or nobody who reads it: never wait for that
        pipe = os.open(f"{stem}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
        try:
            return os.write(pipe, b"1") == 1
        finally:
            os.close(pipe)
    return False
