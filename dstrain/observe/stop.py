"""`dstrain stop RUN`: have a run save and end, whatever it was started with; and say what was saved.

without a queue  SIGTERM to the supervisor, on the host where `dstrain run` was typed
with a queue     SIGTERM to the job's supervisor, from where the queue answers; jobs that have not begun are cancelled
"""

import json
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from pathlib import Path

from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART_ME, UserError
from dstrain.observe.run_record import (
    RunRecord,
    check_run_folder,
    close_record,
    jobs_of,
    lock_holder,
    queue_of,
    state_of_run,
)
from dstrain.rundir.run_folder import attempt_folder, newest_checkpoint, newest_checkpoint_step, next_attempt
from dstrain.transport.transport import JobState, Queue

_LOOK_EVERY_SECONDS = 0.2
_GRACE_SECONDS = 90.0  # for what comes after the shutdown timeout
_UNKNOWN_TIMEOUT_SECONDS = 600  # of the plain scripts


def stop_command(args: Namespace) -> int:
    """`dstrain stop RUN`.

    Returns:
        0 the run is stopped, or was not running; 1 it ended without saving what it had, or does not end.

    Raises:
        UserError: this is no run's folder, or its supervisor cannot be reached from here.
    """
    run_dir = Path(args.run).expanduser()
    check_run_folder(run_dir)
    record = RunRecord.read(run_dir)
    state = state_of_run(run_dir, record, time.time())
    if state in ("ended", "lost"):
        how = "" if state == "ended" else " (its supervisor was killed, or its machine lost)"
        print(f"{run_dir} is not running{how}; {newest_checkpoint(run_dir)}")
        return EXIT_DONE
    queue = None if record is None else queue_of(record)
    if record is not None and queue is not None:
        cancelled = _stop_jobs(record, queue)
        if state == "queued":
            close_record(run_dir, EXIT_RESTART_ME)
            print(f"cancelled {cancelled}, which had not begun; {newest_checkpoint(run_dir)}")
            return EXIT_DONE
    else:
        _stop_process(run_dir, record)
    timeout = (record.shutdown_timeout_seconds if record else _UNKNOWN_TIMEOUT_SECONDS) + _GRACE_SECONDS
    print(f"asked it to stop; it has {timeout:.0f} s to end its step and to save", file=sys.stderr, flush=True)
    if not _wait_for_end(run_dir, record, timeout):
        print(f"{run_dir} has not ended after {timeout:.0f} s; `dstrain status` shows what it does", file=sys.stderr)
        return EXIT_FAILURE
    return _report(run_dir)


def _stop_process(run_dir: Path, record: RunRecord | None) -> None:
    pid = lock_holder(run_dir)
    if pid is None:
        where = "another machine" if record is None else f"{record.host} (process {record.pid})"
        raise UserError(
            f"{run_dir} is supervised from {where}, and this is {socket.gethostname()}; run `dstrain stop` there"
        )
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise UserError(f"{run_dir} belongs to another user's process {pid}; ask them to stop it") from None
    except ProcessLookupError:
        return  # it ends by itself


def _stop_jobs(record: RunRecord, queue: Queue) -> str:
    """Ask the job that runs to stop, and cancel those that have not begun; returns the latter in words."""
    states = {job: state for job in jobs_of(record) if (state := queue.state(job)) is not None}
    waiting = [job for job, state in states.items() if state is JobState.PENDING]
    for job in waiting:  # first: one of a chain would begin as the other ends
        queue.cancel(job)
    for job in states.keys() - set(waiting):
        queue.ask_to_stop(job)
    return f"job{'s' if len(waiting) != 1 else ''} {', '.join(waiting)}"


def _wait_for_end(run_dir: Path, record: RunRecord | None, seconds: float) -> bool:
    queue = None if record is None else queue_of(record)
    every = _LOOK_EVERY_SECONDS if queue is None else queue.poll_seconds
    deadline = time.monotonic() + seconds
    while state_of_run(run_dir, RunRecord.read(run_dir), time.time()) == "running":
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def _report(run_dir: Path) -> int:
    """Say what is left of the run."""
    folder, record = attempt_folder(run_dir, next_attempt(run_dir) - 1), RunRecord.read(run_dir)
    try:
        outcome = json.loads((folder / "outcome.json").read_text())
    except (OSError, ValueError):
        outcome = None
    if outcome is not None and outcome["step"] == newest_checkpoint_step(run_dir):
        words = "done" if outcome["outcome"] == "done" else "stopped"
        print(f"{words}, and saved at step {outcome['step']:,}; the same `dstrain run` goes on from there")
        return EXIT_DONE
    if outcome is not None or (record is not None and record.exit_code == EXIT_RESTART_ME):
        print(f"stopped before it had anything to save; {newest_checkpoint(run_dir)}")
        return EXIT_DONE
    print(f"ended without saving; {newest_checkpoint(run_dir)}; `dstrain status` says what happened")
    return EXIT_FAILURE
