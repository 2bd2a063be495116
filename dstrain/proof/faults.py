"""The catalogue of faults: what is done to a run, and what has to come of it.

Signals, files, a limit of memory: from outside, as it would happen. What has to happen inside a rank at an exact phase
is ordered from `dstrain.proof.fault_entry`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dstrain.base.phases import RankPhase
from dstrain.base.processes import run
from dstrain.checkpoint.commit import LATEST
from dstrain.data.stream import WORKER_PROGRAM
from dstrain.errors import EXIT_RESTART_ME, EXIT_USER_ERROR
from dstrain.proof import linked_corpus
from dstrain.proof.course import Course

KILLED = -signal.SIGKILL
_LEAST_ROOM_BYTES = 1 << 28  # that a rank may use up before the kernel ends it


@dataclass(frozen=True)
class Expected:
    """What has to come of a fault. Texts are regular expressions."""

    exit_code: int | None = None  # of `dstrain run`, after which the same command is given again; None: it goes on
    fails: bool = True  # there is a verdict
    blames_rank: bool = True  # and it names the chosen rank
    how: str = ""
    cause: str = ""
    decision: str = "restart"
    resumes_from: Literal["nothing", "stop", "newest", "older"] = "newest"  # which checkpoint


@dataclass(frozen=True)
class Fault:
    """One entry. `inject` does it, `heal` undoes what would still be there for the next attempt."""

    name: str
    what: str
    expected: Expected
    inject: Callable[[Course], None]
    heal: Callable[[Course], None] = lambda course: None
    missing: Callable[[Course], str | None] = lambda course: None  # why it cannot be tried here, and the remedy
    overrides: tuple[str, ...] = ()  # of the recipe


def signalled(number: signal.Signals) -> Callable[[Course], None]:
    """A signal to the chosen rank."""
    return lambda course: course.trial.signal_rank(course.rank, number)


def ordered(happening: str, phase: RankPhase, *, all_ranks: bool = False) -> Callable[[Course], None]:
    """Something inside the chosen rank, when it next begins that phase."""
    return lambda course: course.order(happening, phase, None if all_ranks else course.rank)


# ---------------------------------------------------------------- what is done


def _stop(course: Course) -> None:
    course.trial.stop()


def _exhaust_memory(course: Course) -> None:
    assert course.group is not None
    used = course.group.used_bytes()
    course.group.limit(used + max(_LEAST_ROOM_BYTES, used // 4))
    course.order("memory", RankPhase.FORWARD, course.rank)


def _lift_limit(course: Course) -> None:
    assert course.group is not None
    course.group.limit(None)


def _flip_bit(course: Course) -> None:
    """The whole run is killed, and meanwhile the largest file of its newest checkpoint changes in one bit."""
    course.trial.end()
    folder = course.newest_checkpoint()
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with file.open("r+b") as stream:
        place = file.stat().st_size // 2
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def _tear_latest(course: Course) -> None:
    course.trial.end()
    latest = course.run_dir / "checkpoints" / LATEST
    latest.write_bytes(latest.read_bytes()[:7])


def _damage_shard(course: Course) -> None:
    course.trial.end()
    shard = linked_corpus.next_shard(course.masked_lm_recipe, course.newest_checkpoint())
    course.damaged = shard, shard.resolve()
    linked_corpus.damage(shard)
    course.injected_unix = time.time()
    course.start()


def _repair_shard(course: Course) -> None:
    assert course.damaged is not None
    linked_corpus.repair(*course.damaged)


def _wedge_reader(course: Course) -> None:
    """SIGSTOP of the process that makes the chosen rank's rows."""
    os.kill(_reader_of(course.trial.rank_pid(course.rank)), signal.SIGSTOP)


def _reader_of(rank_pid: int) -> int:
    children = Path(f"/proc/{rank_pid}/task").glob("*/children")
    for pid in (word for file in children for word in file.read_text().split()):
        if WORKER_PROGRAM.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return int(pid)
    raise ProcessLookupError(f"process {rank_pid} has no data process")


# ---------------------------------------------------------------- what it takes


def _needs_group(course: Course) -> str | None:
    if course.group is not None:
        return None
    return "no control group can be made here; run as root, or under `systemd-run --user --scope -p Delegate=yes`"


def _needs_mounts(course: Course) -> str | None:
    return None if course.private_mounts else "mounting is not allowed here; run as root, or allow user namespaces"


def _needs_shards(course: Course) -> str | None:
    return None if course.reads_shards else f"the task {course.recipe.task} reads no shards; drill a masked_lm recipe"


def can_mount() -> bool:
    """Whether a process may have a mount table of its own here."""
    program = "from dstrain.proof.fault_entry import private_mounts; private_mounts()"
    return run([sys.executable, "-c", program]).exit_code == 0


# ---------------------------------------------------------------- the catalogue

_BY_KILL = Expected(how="killed by SIGKILL", cause="something outside the run sent SIGKILL")

CATALOGUE: tuple[Fault, ...] = (
    Fault("kill", "SIGKILL of a rank", _BY_KILL, signalled(signal.SIGKILL)),
    Fault(
        "segfault",
        "SIGSEGV of a rank",
        Expected(how="killed by SIGSEGV", cause="a crash in native code"),
        signalled(signal.SIGSEGV),
    ),
    Fault(
        "exception",
        "an exception in a rank",
        Expected(how="RuntimeError: drill: an exception"),
        ordered("exception", RankPhase.BACKWARD),
    ),
    Fault(
        "out-of-memory",
        "a rank exceeds the memory limit",
        Expected(how="killed by SIGKILL", cause="the kernel's out-of-memory killer: "),
        _exhaust_memory,
        heal=_lift_limit,
        missing=_needs_group,
    ),
    Fault(
        "lost-in-save", "SIGKILL of a rank that writes", _BY_KILL, ordered("lost while writing", RankPhase.SAVE_WRITE)
    ),
    Fault(
        "slow-disk",
        "every flush takes 0.5 s longer",
        Expected(fails=False, resumes_from="nothing"),
        ordered("slow disk", RankPhase.DATA, all_ranks=True),
    ),
    Fault(
        "full-disk",
        "no space left for a rank's file",
        Expected(EXIT_USER_ERROR, how="no space left", cause="the disk is full", decision="user error"),
        ordered("full disk", RankPhase.SAVE_WRITE),
        missing=_needs_mounts,
    ),
    Fault(
        "corrupt-shard",
        "killed; a shard is overwritten",
        Expected(EXIT_USER_ERROR, blames_rank=False, how=r"shards check|repair or remove", decision="user error"),
        _damage_shard,
        heal=_repair_shard,
        missing=_needs_shards,
    ),
    Fault(
        "flipped-bit",
        "killed; a checkpoint's bit flips",
        Expected(KILLED, fails=False, resumes_from="older"),
        _flip_bit,
    ),
    Fault("torn-latest", "killed; `latest` is torn", Expected(KILLED, fails=False), _tear_latest),
    Fault(
        "frozen",
        "SIGSTOP of a rank",
        Expected(how="its process was stopped for", cause="something stopped its process"),
        signalled(signal.SIGSTOP),
    ),
    Fault(
        "hung",
        "a rank hangs in its forward pass",
        Expected(how="stood still for .* in phase forward", cause="it hangs, and the other ranks waited for it"),
        ordered("hang", RankPhase.FORWARD),
    ),
    Fault(
        "wedged-reader",
        "SIGSTOP of a rank's data process",
        Expected(how="stood still for .* in phase data", cause="its data process made no rows"),
        _wedge_reader,
        missing=_needs_shards,
    ),
    Fault("stop", "SIGTERM of the run", Expected(EXIT_RESTART_ME, fails=False, resumes_from="stop"), _stop),
)
NAMES = tuple(fault.name for fault in CATALOGUE)
