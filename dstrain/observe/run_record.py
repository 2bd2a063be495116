"""`run.json`: where a run was started and how it can be reached; and from that whether it is still there.

Written by the supervisor at the beginning of each attempt and at its own end, and by `dstrain run` as it hands a run to
a queue. A supervisor that is killed writes nothing, so nothing is believed of the file alone: on the supervisor's host
the process that holds `run.lock` is looked at, of a job its queue is asked, and anywhere else the age of the last sign
of life has to do.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dstrain.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError
from dstrain.rundir.attempt_files import write_json
from dstrain.transport.command import Job
from dstrain.transport.transport import TRANSPORTS, JobState, Queue

FILE_NAME = "run.json"
SILENT_AFTER_SECONDS = 60.0

State = Literal["running", "queued", "ended", "lost", "silent"]


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds."""

    name: str
    transport: str
    host: str | None  # of the supervisor; None: a job that has not begun yet
    pid: int | None  # of the supervisor
    hosts: tuple[str, ...]  # the nodes
    ranks: int  # of each node
    shutdown_timeout_seconds: int
    started_unix: float
    job: str | None = None  # the job of a queue that the supervisor runs in
    jobs: tuple[str, ...] = ()  # all that were submitted together
    ended_unix: float | None = None
    exit_code: int | None = None

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord | None":
        """None if there is none, as of runs that the plain scripts started."""
        try:
            values = json.loads((run_dir / FILE_NAME).read_text())
            return cls(**{**values, "hosts": tuple(values["hosts"]), "jobs": tuple(values["jobs"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        """Put it in place as a whole. A full disk must not keep a run from going on."""
        with contextlib.suppress(OSError):
            write_json(run_dir / FILE_NAME, asdict(self))


class Recorder:
    """Keeps the record of a run that is supervised here."""

    def __init__(self, job: Job) -> None:
        earlier = RunRecord.read(job.run_dir)
        self._run_dir = job.run_dir
        self._record = RunRecord(
            name=job.name,
            transport="local" if job.cluster is None else job.cluster.transport,
            host=socket.gethostname(),
            pid=os.getpid(),
            hosts=(),
            ranks=job.ranks,
            shutdown_timeout_seconds=job.shutdown_timeout_seconds,
            started_unix=time.time(),
            job=job.scheduler_job,
            jobs=earlier.jobs if earlier is not None and job.scheduler_job is not None else (),
        )

    def attempt(self, job: Job) -> None:
        """An attempt of `job` begins."""
        hosts = (socket.gethostname(),) if job.cluster is None else job.cluster.hosts
        self._record = replace(self._record, hosts=hosts)
        self._record.write(self._run_dir)

    @contextmanager
    def ending(self) -> Iterator[list[int]]:
        """Record how it ended: what was put into the list, else by an error."""
        codes: list[int] = []
        try:
            yield codes
        except UserError:
            codes.append(EXIT_USER_ERROR)
            raise
        finally:
            code = codes[-1] if codes else EXIT_FAILURE
            replace(self._record, ended_unix=time.time(), exit_code=code).write(self._run_dir)


def close_record(run_dir: Path, exit_code: int) -> None:
    """Record that the run ended without another attempt."""
    if (record := RunRecord.read(run_dir)) is not None:
        replace(record, ended_unix=time.time(), exit_code=exit_code).write(run_dir)


def check_run_folder(run_dir: Path) -> None:
    """Raises UserError: this is no run's folder."""
    if not run_dir.is_dir() or not ((run_dir / "recipe.yaml").is_file() or (run_dir / "attempts").is_dir()):
        raise UserError(f"{run_dir} is no run's folder: it has no recipe.yaml; give what `dstrain run` wrote into")


def lock_holder(run_dir: Path) -> int | None:
    """The process on this machine that holds the folder's lock; None if none does."""
    lock = run_dir / "run.lock"
    try:
        pid, wanted = int(lock.read_text()), lock.stat()
        process = Path("/proc") / str(pid)
        if os.getuid() not in (0, process.stat().st_uid):
            # Another user's, whose files cannot be seen. That it is the lock's owner has to do.
            return pid if process.stat().st_uid == wanted.st_uid else None
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                there = descriptor.stat()
                if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return pid
    except (OSError, ValueError):
        return None
    return None


def last_sign_of_life(run_dir: Path) -> float | None:
    """When something of the run last wrote a status, by the clock of this machine's file system; None: never."""
    files = [*(run_dir / "status").glob("*.json"), *(run_dir / "status").glob("*/*.json"), run_dir / FILE_NAME]
    times = []
    for file in files:
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times, default=None)


def state_of_run(run_dir: Path, record: RunRecord | None, now_unix: float) -> State:
    """Whether the run is there.

    running   its supervisor lives, as far as can be seen from here
    queued    it waits in the scheduler's queue
    ended     its supervisor has said how
    lost      it has not, and is gone
    silent    it may be on another machine, and nothing was heard of it for a minute
    """
    if lock_holder(run_dir) is not None:
        return "running"
    if record is None:  # a plain script's; it leaves no record of its end
        return "ended"
    queue = queue_of(record)
    if queue is not None and queue.is_reachable():
        states = [state for job in jobs_of(record) if (state := queue.state(job)) is not None]
        if record.ended_unix is None and JobState.RUNNING in states:
            return "running"
        return "queued" if states else "lost" if record.ended_unix is None else "ended"
    if record.ended_unix is not None:
        return "ended"
    if record.host == socket.gethostname():
        return "lost"
    heard = last_sign_of_life(run_dir)
    return "running" if heard is not None and now_unix - heard < SILENT_AFTER_SECONDS else "silent"


def queue_of(record: RunRecord) -> Queue | None:
    """The queue that the run was handed over to, if any. Raises UserError: its transport is not installed here."""
    return TRANSPORTS.named(record.transport, "transport").queue


def jobs_of(record: RunRecord) -> tuple[str, ...]:
    """The queue's jobs that may still be there, the one that ran last in front."""
    return tuple(dict.fromkeys([*([record.job] if record.job is not None else []), *record.jobs]))
