"""Why an attempt failed, and what to do: pure, from what its ranks left behind.

When one rank dies, its peers lose their connections to it and fail as well, often within the same second and with far
more text. So consequences are told from causes first, and only then is the earliest one taken.
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# What a rank says that lost a peer, in gloo's, NCCL's and the c10d store's words.
_CONSEQUENCE = re.compile(
    r"Connection (?:was )?(?:closed by|reset by|refused|aborted)|Broken pipe|pair closure|Socket (?:closed|Timeout)"
    r"|data process .* was killed by SIGTERM"
    r"|recvValue failed|failed to recv|remote process exited|ncclRemoteError|communicator was aborted"
    r"|(?:Timed out|timed out|Timeout) (?:waiting|after waiting)|collective operation timeout"
)
_OWN_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)

_LINE_CHARACTERS = 160
OnHang = Literal["restart", "stop"]
Decision = Literal["restart", "restart without the node", "give up", "user error"]


@dataclass(frozen=True)
class RankFailure:
    """One rank that did not end well; `rank` None stands for the agent that starts them.

    `exit_code` is negative for a signal, as in `subprocess`; None if unknown.
    """

    rank: int | None
    host: str
    exit_code: int | None
    time_unix: float
    kind: Literal["user", "exception"] | None = None  # None: it left no last words
    error_type: str | None = None
    message: str = ""
    phase: str | None = None
    step: int | None = None
    log: str = ""
    log_tail: tuple[str, ...] = ()
    monotonic: float | None = None  # when, by the supervisor's monotonic clock: comparable between hosts
    blames_rank: int | None = None  # whose failure it reports, where all ranks learn of it together
    is_hang: bool = False  # it stood still and was killed for that
    stack: tuple[str, ...] = ()  # where it stood then, the innermost frame first
    out_of_memory: bool = False  # the kernel's log says that it killed this very process for memory

    @property
    def is_consequence(self) -> bool:
        """Whether it failed because another rank had failed (or was ended by the agent after that)."""
        if self.blames_rank is not None and self.blames_rank != self.rank:
            return True
        if self.kind == "user":
            return False
        if self.kind == "exception":
            return _CONSEQUENCE.search(self.message) is not None
        if self.exit_code == -signal.SIGTERM:
            return True
        return self.exit_code == -signal.SIGABRT and _CONSEQUENCE.search("\n".join(self.log_tail)) is not None

    @property
    def is_lost_node(self) -> bool:
        """Whether a whole node ended without a word, so that others may do better."""
        return self.rank is None and self.kind is None

    @property
    def who(self) -> str:
        """`rank 1 on node7`."""
        return f"{'the launcher' if self.rank is None else f'rank {self.rank}'} on {self.host}"

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.error_type is not None:
            return f"{self.error_type}: {self.message.strip() or '(no message)'}"
        if self.message:
            return self.message
        if self.exit_code is None:
            return "ended without saying why"
        if self.exit_code < 0:
            return f"killed by {signal_name(-self.exit_code)}"
        return f"exited with code {self.exit_code}"


@dataclass(frozen=True)
class Verdict:
    """The first failure of an attempt and what is done about it."""

    attempt: int
    first: RankFailure
    consequences: tuple[RankFailure, ...]
    cause: str
    remedy: str
    decision: Decision
    reason: str

    def as_json(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        return asdict(self)

    def as_text(self) -> str:
        """For people, ends without a newline."""
        first = self.first
        where = "" if first.step is None else f" at step {first.step:,}"
        if first.phase is not None:
            where += f", phase {first.phase}"
        lines = [f"attempt {self.attempt}: {first.who} failed first{where}"]
        lines += _field("what", first.how)
        if self.cause:
            lines += _field("cause", self.cause)
        if self.remedy:
            lines += _field("remedy", self.remedy)
        if first.stack:
            lines += _field("stack", "\n".join(first.stack))
        if first.log:
            lines += _field("log", first.log)
            lines += [f"            | {line}" for line in first.log_tail]
        if self.consequences:
            one, *more = self.consequences
            others = f" (and {len(more)} more)" if more else ""
            lines += _field("after it", f"{one.who}: {_first_line(one.how)}{others}")
        lines += _field("decision", f"{self.decision}: {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PastFailure:
    """What the next decision needs to know of an attempt that failed."""

    made_progress: bool  # it committed a newer checkpoint than there was before it
    signature: tuple[object, ...] | None  # equal for two failures that are the same; None: never the same (a signal)


def first_failure(failures: Sequence[RankFailure]) -> tuple[RankFailure, tuple[RankFailure, ...]]:
    """The failure to blame, and the others in order: causes before consequences, then by time, then by rank.

    Time is the supervisor's monotonic clock, where that is known of all: the hosts' wall clocks differ, and jump.
    """
    comparable = all(failure.monotonic is not None for failure in failures)

    def order(failure: RankFailure) -> tuple[bool, float, int]:
        moment = failure.monotonic if comparable and failure.monotonic is not None else failure.time_unix
        return failure.is_consequence, moment, failure.rank or 0

    ordered = sorted(failures, key=order)
    return ordered[0], tuple(ordered[1:])


def signature(failure: RankFailure) -> tuple[object, ...] | None:
    """Identifies a failure that would come again: the same exception with the same message at the same step."""
    if failure.error_type is None or failure.is_consequence:
        return None
    return (failure.error_type, failure.message, failure.step)


def decide(
    first: RankFailure,
    past: Sequence[PastFailure],
    max_restarts: int,
    hosts_left: Sequence[str] = (),
    on_hang: OnHang = "restart",
) -> tuple[Decision, str]:
    """What to do after the failures `past` (oldest first, this one last), and why.

    Restarts are counted since the newest checkpoint: a run that gets further each time may go on, one that does not is
    stopped after `max_restarts`, or after the same exception at the same step came twice.

    Args:
        first: the failure to blame.
        past: the failures so far.
        max_restarts: the limit.
        hosts_left: on which the run could go on without the host of `first`; none: they are too few, or it is needed.
        on_hang: what the profile says of ranks that stand still.
    """
    if first.kind == "user":
        return "user error", "the input has to be corrected first"
    if is_lasting(first):
        return "give up", "every restart would meet it again"
    if first.is_hang and on_hang == "stop":
        return "give up", "the profile says on_hang: stop"
    without_progress = 0
    for failure in reversed(past):
        without_progress += 1
        if failure.made_progress:
            break
    this = past[-1]
    again = len(past) > 1 and this.signature is not None and this.signature == past[-2].signature
    if again and not this.made_progress:
        return "give up", "the same error came twice at the same step, a restart would meet it again"
    if without_progress > max_restarts:
        return "give up", f"--max-restarts={max_restarts}, and none of these restarts brought a newer checkpoint"
    count = f"{without_progress} of {max_restarts} since the newest checkpoint"
    if first.is_lost_node and hosts_left:
        return "restart without the node", f"{first.host} is left out, {', '.join(hosts_left)} remain; {count}"
    return "restart", count


def explain(first: RankFailure, new_oom_kills: int | None) -> tuple[str, str]:
    """(cause, remedy) of the known kinds of failure; ("", "") for the others, whose own words have to do.

    `new_oom_kills` is how many processes the kernel killed for memory during the attempt; None where that is not known.
    """
    text = _text(first)
    for pattern, cause, remedy in _HANGS:
        if re.match(pattern, first.message):
            return cause, remedy
    if (first.exit_code == -signal.SIGKILL and first.kind is None) or _DATA_PROCESS_KILLED.search(text):
        if new_oom_kills or first.out_of_memory:
            return (
                "the kernel's out-of-memory killer: the machine or its control group ran out of host memory",
                "lower train.micro_batch_rows, start fewer ranks on the node, or raise its memory limit",
            )
        unknown = "" if new_oom_kills == 0 else ", perhaps the kernel's out-of-memory killer (see `dmesg`)"
        return (f"something outside the run sent SIGKILL{unknown}", "find out who; nothing in the run has to change")
    if first.exit_code == -signal.SIGBUS or "bus error" in text.lower():
        return (
            "a mapped file lost its storage: /dev/shm is full, or a shard was truncated",
            "look at `df -h /dev/shm`, and run `dstrain shards check` on the corpus",
        )
    for pattern, cause, remedy in (*_LASTING, *_KNOWN):
        if re.search(pattern, text):
            return cause, remedy
    if first.exit_code is not None and -first.exit_code in _OWN_FAULTS and first.kind is None:
        return ("a crash in native code", "see the Python stacks of all threads in the log; try train.compile=false")
    return "", ""


def is_lasting(first: RankFailure) -> bool:
    """Whether the installation is at fault, so that no restart can help."""
    return any(re.search(pattern, _text(first)) for pattern, _, _ in _LASTING)


def _text(first: RankFailure) -> str:
    """All that it said, the type of its exception first."""
    return "\n".join([first.error_type or "", first.message, *first.log_tail])


_HANGS: tuple[tuple[str, str, str], ...] = (
    (
        r"its process was stopped for .*, and was killed",
        "something stopped its process: SIGSTOP, or a debugger",
        "find out who; nothing in the run has to change",
    ),
    (
        r"it stood still for .* in phase data, and was killed",
        "its data process made no rows: it hangs, or the storage does",
        "look at that node's storage; the log has the stacks. If the data are only slow, raise hang_timeout_seconds",
    ),
    (
        r"it stood still for .*, and was killed",
        "it hangs, and the other ranks waited for it",
        "the logs have every rank's stacks. If that phase only takes long, raise hang_timeout_seconds",
    ),
)
_DATA_PROCESS_KILLED = re.compile(r"data process .* was killed by SIGKILL")

_LASTING: tuple[tuple[str, str, str], ...] = (
    (
        r"is required for a normal functioning of this module, but found|VersionConflict|DistributionNotFound"
        r"|version `[\w.]+' not found|undefined symbol|Mismatched NCCL version|compiled using NumPy 1"
        r"|ImportError\ncannot import name",
        "versions of packages that do not fit together",
        "install those of constraints.txt into the interpreter that the ranks run in (its path is in command.json)",
    ),
    (
        r"No module named '?([\w.]+)",
        "a Python package is missing where the ranks run",
        "install the project's dependencies into the interpreter that `dstrain` runs in",
    ),
    (
        r"cannot open shared object file",
        "a shared library is missing where the ranks run",
        "install the library that the message names, or load its module in the profile (`modules`)",
    ),
)

_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"shared memory\(shm\)|/dev/shm|[Ee]rror while creating shared memory",
        "/dev/shm, the memory that processes share, is full or too small",
        "look at `df -h /dev/shm`; in a container enlarge it (`--shm-size`, or mount the host's)",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "the device ran out of memory",
        "lower train.micro_batch_rows (the global batch stays), set model.activation_checkpointing=true, "
        "or raise train.zero.stage",
    ),
    (
        r"[Nn]o space left|ENOSPC|\[Errno 28\]|Disk quota exceeded|\[Errno 122\]",
        "the disk is full",
        "free some space (`dstrain ckpt prune`, a lower checkpoint.keep_last), then run the same command again",
    ),
    (
        r"Address already in use|EADDRINUSE|\[Errno 98\]",
        "another program holds the port of the process group",
        "nothing, where each attempt takes another port; else free the port that the profile's network section names",
    ),
    (
        r"CUDA error|device-side assert|ECC error|\bXid\b",
        "the device reported an error",
        "look at `nvidia-smi -q` and `dmesg`; if it comes again on the same device, take that device out",
    ),
    (
        r"collective operation timeout|[Tt]imed out waiting|Timeout waiting",
        "a rank waited too long for the others: one hangs, is far slower, or lost its network",
        "send SIGUSR2 to the ranks of a run that hangs: each writes all its stacks into its log",
    ),
    (
        _CONSEQUENCE.pattern,
        "a rank lost the connection to another one that left no trace of its own",
        "look at the other ranks' logs and at the network between the nodes",
    ),
)


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 200` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_line(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) <= _LINE_CHARACTERS else line[: _LINE_CHARACTERS - 1] + "…"


def _field(name: str, text: str) -> list[str]:
    first, *rest = text.splitlines()
    return [f"  {name:<9} {first}", *(f"            {line}" for line in rest)]
