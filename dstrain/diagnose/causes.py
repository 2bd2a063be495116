"""Known causes of failures, and what to do about each: from exit codes, signals, and libraries' messages in logs."""

import re
import signal

from dstrain.diagnose.failure import LOST_CONNECTION, Hang, RankFailure

_OWN_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


def explain(first: RankFailure, new_oom_kills: int | None) -> tuple[str, str]:
    """(cause, remedy) of the known kinds of failure; ("", "") for the others, whose own words have to do.

    `new_oom_kills` is how many processes the kernel killed for memory during the attempt; None where that is not known.
    """
    text = _text(first)
    if first.hang is not None:
        return _cause_of_hang(first.hang)
    if (first.exit_code == -signal.SIGKILL and first.kind is None) or first.data_process_exit_code == -signal.SIGKILL:
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


def _cause_of_hang(hang: Hang) -> tuple[str, str]:
    if hang.is_stopped:
        return (
            "something stopped its process: SIGSTOP, or a debugger",
            "find out who; nothing in the run has to change",
        )
    if hang.phase.waits_for_no_rank:
        return (
            "its data process made no rows: it hangs, or the storage does",
            "look at that node's storage; the log has the stacks. If the data are only slow, "
            "raise hang_timeout_seconds",
        )
    return (
        "it hangs, and the other ranks waited for it",
        "the logs have every rank's stacks. If that phase only takes long, raise hang_timeout_seconds",
    )


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
        LOST_CONNECTION.pattern,
        "a rank lost the connection to another one that left no trace of its own",
        "look at the other ranks' logs and at the network between the nodes",
    ),
)
