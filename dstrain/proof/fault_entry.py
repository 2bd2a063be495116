"""What each rank of a drill calls instead of `dstrain.train.main:run_rank`: the same training, and what is ordered.

    DIR/drill/orders.json      written by the drill: what is to happen, to which rank, in which attempt, step and phase
    DIR/drill/phases.jsonl     written here: when each attempt first came to each phase
    DIR/drill/fired.json       written here: when it happened

Only what cannot be done to a process from outside is here. Training tells its reporter each phase as it begins, so a
reporter that also looks at the orders is all that it takes; the training itself holds no hook.
"""

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dstrain.base.phases import RankPhase
from dstrain.rundir.attempt_files import write_json

if TYPE_CHECKING:
    from _typeshed import HasFileno

ENTRY = f"{__name__}:run_rank"
SLOW_FSYNC_SECONDS = 0.5
_MEMORY_BLOCK_BYTES = 1 << 24
_FULL_DISK_BYTES = 4096
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # <linux/sched.h>
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000  # <linux/mount.h>


@dataclass(frozen=True)
class Order:
    """What is to happen: when rank `rank` (None: every rank) begins `phase` after `step` steps of attempt `attempt`."""

    happening: str
    rank: int | None
    attempt: int
    step: int
    phase: RankPhase

    def is_due(self, rank: int, attempt: int, step: int, phase: RankPhase) -> bool:
        """Whether it is to happen now."""
        here = self.rank in (None, rank) and attempt == self.attempt
        return here and step >= self.step and phase == self.phase


@dataclass(frozen=True)
class Orders:
    """The content of `orders.json`."""

    step_seconds: float = 0.0  # no step is shorter: tiny models leave no time for anything to happen
    private_mounts: bool = False  # each rank gets a mount table of its own
    order: Order | None = None

    def write(self, run_dir: Path) -> None:
        """Give them. Ranks look once in a phase."""
        write_json(run_dir / "drill" / "orders.json", asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Those of a run."""
        content = json.loads((run_dir / "drill" / "orders.json").read_text())
        order = content.pop("order")
        return cls(**content, order=None if order is None else Order(**order | {"phase": RankPhase(order["phase"])}))


def run_rank(run_dir: Path, attempt: int) -> str:
    """Train as `dstrain.train.main:run_rank` does, with a reporter that looks at the orders."""
    if Orders.read(run_dir).private_mounts:
        private_mounts()  # before any library has threads
    from dstrain.train import main
    from dstrain.train.reporting import Reporter

    class Drilled(Reporter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.watch = Watch(run_dir, attempt, arguments[0].rank)

        def phase(self, phase: RankPhase, **status: Any) -> None:
            super().phase(phase, **status)
            if not phase.is_step_of_save:  # training only waits in these
                self.watch.begins(phase, status.get("step"))

        def saving(self, phase: RankPhase) -> None:
            super().saving(phase)
            self.watch.begins(phase)

        def progress(self, step: int) -> None:
            super().progress(step)
            self.watch.made(step)

    return main.run_rank(run_dir, attempt, Drilled)


class Watch:
    """Follows one rank through its phases."""

    def __init__(self, run_dir: Path, attempt: int, rank: int) -> None:
        self._run_dir, self._attempt, self._rank = run_dir, attempt, rank
        self._step = 0
        self._step_began = 0.0
        self._seen: set[tuple[RankPhase, int | None]] = set()

    def begins(self, phase: RankPhase, step: int | None = None) -> None:
        """The rank begins a phase."""
        if step is not None:
            self._step = step
        orders = Orders.read(self._run_dir)
        self._note(phase, step)
        if phase is RankPhase.DATA:
            time.sleep(max(0.0, self._step_began + orders.step_seconds - time.monotonic()))
            self._step_began = time.monotonic()
        order = orders.order
        if order is not None and order.is_due(self._rank, self._attempt, self._step, phase):
            write_json(self._run_dir / "drill" / "fired.json", {"time_unix": time.time(), "step": self._step})
            HAPPENINGS[order.happening](self._run_dir, self._rank)

    def made(self, step: int) -> None:
        """The rank has made a step."""
        self._step = step
        self._note(RankPhase.MADE, None)

    def _note(self, phase: RankPhase, step: int | None) -> None:
        if self._rank == 0 and (phase, step) not in self._seen:
            self._seen.add((phase, step))
            line = {"attempt": self._attempt, "phase": phase, "step": step, "time_unix": time.time()}
            with (self._run_dir / "drill" / "phases.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------- what can happen


def raise_exception(run_dir: Path, rank: int) -> None:
    """A bug."""
    raise RuntimeError(f"drill: an exception on rank {rank}")


def hang(run_dir: Path, rank: int) -> None:
    """A deadlock, or a device that does not answer."""
    threading.Event().wait()


def exhaust_memory(run_dir: Path, rank: int) -> None:
    """A leak, until the kernel ends it."""
    held = []
    while True:
        held.append(b"\1" * _MEMORY_BLOCK_BYTES)


def fill_disk(run_dir: Path, rank: int) -> None:
    """This rank, and no other, sees a full disk where it is about to save: a tiny one is mounted there."""
    (staging,) = (run_dir / "checkpoints").glob(".staging-*")
    options = f"size={_FULL_DISK_BYTES}".encode()
    _require(_libc().mount(b"tmpfs", bytes(staging), b"tmpfs", 0, options), f"mounting a tmpfs at {staging}")


def die_while_writing(run_dir: Path, rank: int) -> None:
    """SIGKILL as soon as this rank's file of the checkpoint is there."""
    pattern = f".staging-*/rank-{rank:05d}.safetensors"

    def wait_and_die() -> None:
        while not any((run_dir / "checkpoints").glob(pattern)):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_and_die, daemon=True).start()


def slow_down_disk(run_dir: Path, rank: int) -> None:
    """From now on, every flush takes half a second longer."""
    flush = os.fsync

    def slow(fd: "int | HasFileno") -> None:
        time.sleep(SLOW_FSYNC_SECONDS)
        flush(fd)

    if flush.__name__ != slow.__name__:
        os.fsync = slow


HAPPENINGS: dict[str, Callable[[Path, int], None]] = {
    "exception": raise_exception,
    "hang": hang,
    "memory": exhaust_memory,
    "full disk": fill_disk,
    "lost while writing": die_while_writing,
    "slow disk": slow_down_disk,
}


def private_mounts() -> None:
    """Give this process a mount table of its own, as root or through a user namespace. Raises OSError if refused."""
    user, group = os.getuid(), os.getgid()
    libc = _libc()
    _require(libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)), "unshare")
    if user:  # keep the names, or nothing can be written there
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _require(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "making mounts private")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p]
    return libc


def _require(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
