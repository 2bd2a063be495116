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

from dstrain.base.environment import RankVariables
from dstrain.base.extras import explained
from dstrain.base.processes import die_with_parent, may_be_traced_by
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, UserError
from dstrain.rundir.attempt_files import read_status, write_json
from dstrain.rundir.run_folder import TRAINING, attempt_folder


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

    try:
        rank, host = RankVariables.require().rank, socket.gethostname()
    except UserError as error:
        parser.error(str(error))
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
    except BaseException as raised:  # also KeyboardInterrupt and SystemExit: a rank never ends without its last words
        failure = (explained(raised) if isinstance(raised, ModuleNotFoundError) else None) or raised
        with contextlib.suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        last_words = describe_error(failure, rank, host, read_status(arguments.run_dir, arguments.attempt))
        with contextlib.suppress(OSError):
            write_json(folder / "errors" / f"rank-{rank:05d}.json", last_words)
        return EXIT_USER_ERROR if isinstance(failure, UserError) else EXIT_FAILURE
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
        "data_process_exit_code": getattr(error, "data_process_exit_code", None),
        "traceback": "".join(traceback.format_exception(error)),
        "time_unix": time.time(),
        "monotonic": time.monotonic(),
        "rank": rank,
        "host": host,
        "phase": status.get("phase"),
        "step": status.get("step"),
    }


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
