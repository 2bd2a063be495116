"""The CUDA devices of this machine, as far as they are known without importing torch here."""

import sys
from pathlib import Path

from dstrain.base.processes import run


def has_devices() -> bool:
    """Whether this machine has CUDA devices."""
    return Path("/proc/driver/nvidia").exists()


def count_devices() -> int:
    """How many of them torch sees; 0 without a driver."""
    if not has_devices():
        return 0
    # in a process of its own: it knows masks and partitions
    answer = run([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    if answer.exit_code != 0:
        raise RuntimeError(f"torch cannot count the devices of this machine:\n{answer.errors}")
    return int(answer.output)
