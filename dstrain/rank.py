"""One rank of a run: its log, its last words and its exit code; the training itself is `dstrain.train.main`.

    python -m dstrain.rank --run-dir runs/NAME --attempt 1        with RANK and WORLD_SIZE as torchrun sets them

Writes below `attempts/NNNN/`: `logs/HOST/rank-00000.log` (everything printed, here and in libraries),
`ranks/rank-00000.json` (its process id), `errors/rank-00000.json` if it fails, and from rank 0 `outcome.json`.
Exit code: 0 done or stopped (torchrun takes anything else for a failure), 2 the user's input is wrong, 1 anything else.
A fatal signal, and SIGUSR2 at any time, print the Python stacks of all threads.

Only the standard library is imported at the top: a rank's background processes import this module again.
"""

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from dstrain.errors import DISK_FULL, EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, UserError
from dstrain.launch.processes import die_with_parent, may_be_traced_by
from dstrain.launch.run_folder import attempt_folder

TRAINING = "dstrain.train.main:run_rank"

RESERVE = "reserve"  # a file in an attempt's folder
RESERVE_BYTES = 1 << 17


def main(argv: list[str] | None = None) -> int:
    """Run one rank to its end and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dstrain.rank", description="one rank of a run; see its docstring")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's folder, with recipe.yaml in it")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt, from 1")
    parser.add_argument("--parent-pid", type=int, help="end this rank at once when that process, its parent, dies")
    parser.add_argument("--terminal", action="store_true", help="print to the terminal, not to a log; for debuggers")
    parser.add_argument("--entry", default=TRAINING, help="module:function to call with (run_dir, attempt)")
    arguments = parser.parse_args(argv)
    if arguments.parent_pid is not None:
        die_with_parent(arguments.parent_pid)
        may_be_traced_by(arguments.parent_pid)

    if "RANK" not in os.environ:
        parser.error(
            "RANK is not set: start ranks through `dstrain run` or torchrun; RANK=0 WORLD_SIZE=1 for a single one"
        )
    rank, host = int(os.environ["RANK"]), socket.gethostname()
    folder = attempt_folder(arguments.run_dir, arguments.attempt)
    if not arguments.terminal:
        redirect_output(folder / "logs" / host / f"rank-{rank:05d}.log")
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True, chain=False)
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, _leave)
    write_json(folder / "ranks" / f"rank-{rank:05d}.json", {"rank": rank, "host": host, "pid": os.getpid()})

    try:
        outcome = resolve(arguments.entry)(arguments.run_dir, arguments.attempt)
        if rank == 0:
            step = read_status(arguments.run_dir, arguments.attempt).get("step")
            write_json(folder / "outcome.json", {"outcome": outcome, "step": step})
    except BaseException as error:  # also KeyboardInterrupt and SystemExit: a rank never ends without its last words
        with contextlib.suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        last_words = describe_error(error, rank, host, read_status(arguments.run_dir, arguments.attempt))
        with contextlib.suppress(OSError):
            write_json(folder / "errors" / f"rank-{rank:05d}.json", last_words)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    return EXIT_DONE


def redirect_output(log: Path) -> None:
    """Append everything that is printed to `log`, also by libraries in other languages."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def resolve(entry: str) -> Callable[[Path, int], str]:
    """The function named by `module:function`; it returns "done" or "stopped"."""
    module, _, function = entry.partition(":")
    resolved: Callable[[Path, int], str] = getattr(importlib.import_module(module), function)
    return resolved


def describe_error(error: BaseException, rank: int, host: str, status: dict[str, Any]) -> dict[str, Any]:
    """What `errors/rank-NNNNN.json` holds. `status` is the run's, for the step and the phase."""
    return {
        "kind": "user" if isinstance(error, UserError) else "exception",
        "type": type(error).__name__,
        "message": "\n".join([str(error), *getattr(error, "__notes__", ())]),
        "blames_rank": getattr(error, "blames_rank", None),
        "traceback": "".join(traceback.format_exception(error)),
        "time_unix": time.time(),
        "monotonic": time.monotonic(),
        "rank": rank,
        "host": host,
        "phase": status.get("phase"),
        "step": status.get("step"),
    }


def read_status(run_dir: Path, attempt: int) -> dict[str, Any]:
    """The newest status that `attempt` wrote, on whichever node, or {} if it has written none yet."""
    newest: dict[str, Any] = {}
    for file in (run_dir / "status").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            status = json.loads(file.read_text())
            if isinstance(status, dict) and status.get("attempt") == attempt:
                newest = max(newest, status, key=lambda content: content.get("time_unix") or 0.0)
    return newest


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `path` as a whole or not at all. On a full disk the attempt's reserve makes room for it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    for reserve in (path.parent / RESERVE, path.parent.parent / RESERVE, None):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in DISK_FULL or reserve is None:
                raise
            reserve.unlink(missing_ok=True)


def keep_reserve(attempt_folder: Path) -> None:
    """Take some room on the disk, so that an attempt which fills it can still say so."""
    attempt_folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError), (attempt_folder / RESERVE).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)


def _leave(signal_number: int, frame: FrameType | None) -> None:
    """What a stop means until the training listens: nothing was trained yet, so there is nothing to save."""
    os._exit(EXIT_DONE)


def _exit(code: int) -> None:
    """Leave. After a failure at once: interpreter shutdown may wait for threads of a broken process group for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code != EXIT_DONE:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())
