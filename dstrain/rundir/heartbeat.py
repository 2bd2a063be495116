"""Heartbeats: each rank leaves one in memory as it begins a phase; `dstrain.diagnose.watch` looks at a node's.

They cost a rank one write into its own memory, no disk and no network, and cannot outlive it.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.phases import RankPhase

_NAME = "dstrain-heartbeat"


@dataclass(frozen=True)
class Heartbeat:
    """The newest one of a rank. `count` is how many phases it has begun, and how far it is within one."""

    rank: int
    pid: int
    count: float
    monotonic: float
    step: int
    phase: RankPhase
    own_seconds: float = 0.0  # spent so far in phases whose time is the rank's own
    is_stopped: bool = False


class HeartbeatWriter:
    """Leaves a rank's heartbeats. Never raises: without memory for them, the rank is not watched."""

    def __init__(self, rank: int) -> None:
        self._rank, self._count, self._step = rank, 0, 0
        self._phase, self._began, self._own_seconds = RankPhase.STARTING, 0.0, 0.0
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.memfd_create(_NAME)  # goes with the process, however that ends

    def begin(self, phase: RankPhase, step: int | None = None, within: float | None = None) -> None:
        """The rank begins a phase; `step` where it has made another one.

        Ranks are compared by how many phases they have begun. One that not all of them go through, or not at the same
        point of the training, is not counted: it says how far it is, from 0 to 1, `within` the one before it.
        """
        now = time.monotonic()
        if self._phase.is_own_time:
            self._own_seconds += now - self._began
        self._phase, self._began = phase, now
        if within is None:
            self._count += 1
        self._step = self._step if step is None else step
        if self._descriptor is not None:
            count = self._count + (within or 0.0)
            line = f"{self._rank} {os.getpid()} {count} {now:.3f} {self._step} {phase.name} {self._own_seconds:.3f}"
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, line.ljust(127).encode() + b"\n", 0)  # at once: never half of one


def read_heartbeats() -> list[Heartbeat]:
    """Of the ranks that this process has started (see `dstrain.rank`: they are its children), by rank."""
    heartbeats = []
    children = [word for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()]
    for process in (Path("/proc") / pid for pid in children):
        with contextlib.suppress(OSError, ValueError, KeyError):  # it has just ended, or has not begun
            for descriptor in (process / "fd").iterdir():
                if str(descriptor.readlink()).startswith(f"/memfd:{_NAME}"):
                    rank, pid, count, monotonic, step, phase, own = descriptor.read_text().split()
                    state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                    numbers = int(rank), int(pid), float(count), float(monotonic), int(step)
                    heartbeats.append(Heartbeat(*numbers, RankPhase[phase], float(own), state in "Tt"))
    return sorted(heartbeats, key=lambda heartbeat: heartbeat.rank)
