"""Processes: the one place that starts them; and those of an attempt, of which none is ever left behind.

Ranks live in sessions of their own (so that Ctrl-C in the terminal does not reach them) and start processes themselves,
so neither a process group nor the tree of parents finds them all. A mark in the environment does: it is inherited.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

ATTEMPT_MARK = "DSTRAIN_ATTEMPT"  # environment variable: the absolute path of the attempt's folder

_PR_SET_PDEATHSIG, _PR_SET_PTRACER = 1, 0x59616D61  # <linux/prctl.h>
_KERNEL_RECORD_BYTES = 8192  # the longest that there is
_KILLED_FOR_MEMORY = re.compile(rb"[Oo]ut of memory: Killed process (\d+)")

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Finished:
    """A program that has ended, and what it printed; what is not UTF-8 is replaced."""

    exit_code: int  # negative for a signal
    output: str
    errors: str


def run(
    arguments: Sequence[str],
    *,
    given: bytes | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> Finished:
    """Run a program to its end.

    Args:
        arguments: the program, and its arguments.
        given: its standard input; None: nothing.
        environment: instead of this process's.
        timeout_seconds: after which it is killed.

    Raises:
        OSError: it cannot be started.
        TimeoutError: it was killed.
    """
    try:
        done = subprocess.run(
            arguments,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            check=False,
            env=environment,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{arguments[0]} has not ended after {timeout_seconds} s") from None
    return Finished(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def run_in_terminal(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program that reads and prints where this one does; its exit code. Raises OSError."""
    return subprocess.run(arguments, env=environment, check=False).returncode


def start(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: Literal["nothing", "pipe", "inherited"] = "nothing",
    output: IO[bytes] | None = None,
    own_session: bool = False,
    descriptors: Sequence[int] = (),
) -> Process:
    """Start a program, and return while it runs.

    Args:
        arguments: the program, and its arguments.
        environment: instead of this process's.
        stdin: its standard input; a pipe is `.stdin` of what is returned.
        output: for its standard output and error; None: this process's.
        own_session: whether Ctrl-C in the terminal is not for it.
        descriptors: that it inherits.

    Raises:
        OSError: it cannot be started.
    """
    kinds = {"nothing": subprocess.DEVNULL, "pipe": subprocess.PIPE, "inherited": None}
    return subprocess.Popen(
        arguments,
        env=environment,
        stdin=kinds[stdin],
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=own_session,
        pass_fds=tuple(descriptors),
    )


def ends_within(process: Process, seconds: float) -> bool:
    """Wait for its end; whether it came in that time."""
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when its parent dies; exit at once if `parent_pid` is the parent no longer.

    SIGKILL, not SIGTERM: a rank without its supervisor must not go on writing into a folder that a new one may own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def may_be_traced_by(pid: int) -> None:
    """Let that process, and what it starts (py-spy), read this one's memory where the kernel has Yama's scope 1."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, pid, 0, 0, 0)  # it fails without Yama, where nothing is needed


def marked_processes(attempt_folder: Path) -> list[int]:
    """Ids of all living processes that were started for this attempt, in increasing order."""
    mark = f"{ATTEMPT_MARK}={attempt_folder.resolve()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to another user
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return sorted(found)


def end_marked(attempt_folder: Path, timeout_seconds: float = 10.0) -> list[int]:
    """SIGKILL every process of this attempt until there is none; returns those that outlive it, stuck in the kernel."""
    deadline = time.monotonic() + timeout_seconds
    while living := marked_processes(attempt_folder):
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return living
        time.sleep(0.02)
    return []


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory so far; None where it does not say.

    In this control group; without one, on this machine.
    """
    with contextlib.suppress(OSError, ValueError):
        groups = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = path.lstrip("/")
        root = Path("/sys/fs/cgroup")
        candidates = [root / groups.get("", "") / "memory.events", root / "memory.events"]  # version 2
        v1 = root / "memory"
        candidates += [v1 / groups.get("memory", "") / "memory.oom_control", v1 / "memory.oom_control"]
        candidates.append(Path("/proc/vmstat"))  # of the whole machine, for want of better
        for file in candidates:
            with contextlib.suppress(OSError):
                for line in file.read_text().splitlines():
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        return int(value)
    return None


def kernel_oom_victims(since_monotonic: float) -> set[int] | None:
    """Process ids that the kernel's log names as killed for memory since then; None where it may not be read.

    Those of the machine: in a container they are other numbers.
    """
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    found: set[int] = set()
    with os.fdopen(log, "rb", buffering=0):
        while True:
            try:
                record = os.read(log, _KERNEL_RECORD_BYTES)
            except BrokenPipeError:  # overwritten meanwhile: go on with the next one
                continue
            except OSError:  # no more
                return found
            match = _KILLED_FOR_MEMORY.search(record)
            if match and float(record.split(b",")[2]) / 1e6 > since_monotonic:
                found.add(int(match[1]))
