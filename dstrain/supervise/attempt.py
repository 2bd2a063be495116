"""One attempt from its start to its end: launchers, progress, stops, and what it came to."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dstrain.base import environment
from dstrain.base.code_digest import code_version
from dstrain.base.environment import REDACTED
from dstrain.base.ports import free_port
from dstrain.base.processes import end_marked, oom_kills
from dstrain.diagnose import evidence
from dstrain.diagnose.failure import RankFailure
from dstrain.diagnose.watch import watch
from dstrain.errors import CheckpointError
from dstrain.observe.progress import RunProgress, Status
from dstrain.rundir.attempt_files import keep_reserve, read_status, write_json
from dstrain.rundir.goodput import ENDED_FILE
from dstrain.rundir.run_folder import attempt_folder, newest_checkpoint, newest_checkpoint_step
from dstrain.rundir.timings import Timings
from dstrain.supervise.fence import wait_for_silent_nodes
from dstrain.transport.command import Cluster, Job, command, record, rendezvous, with_users_choice
from dstrain.transport.control import BEAT_EVERY_SECONDS
from dstrain.transport.launchers import Launcher, end_all, launcher_log
from dstrain.transport.node_script import AttemptPlan, node_script
from dstrain.transport.stops import Stops
from dstrain.transport.transport import TRANSPORTS

POLL_SECONDS = 0.25
AGENT_GRACE_SECONDS = 60.0  # for a launcher that has not ended after its own shutdown timeout
PEERS_GRACE_SECONDS = 10.0  # for the other nodes to say what they saw, once one has failed


@dataclass(frozen=True)
class Ended:
    """How an attempt ended. `failures` is not empty if it failed."""

    result: Literal["done", "stopped", "killed", "failed"]
    failures: tuple[RankFailure, ...]
    made_progress: bool  # there is a newer checkpoint than before it
    new_oom_kills: int | None


def run_attempt(job: Job, number: int, stops: Stops, progress: RunProgress) -> Ended:
    """Start one attempt, see it through to its end, and leave no process of it behind."""
    folder = attempt_folder(job.run_dir, number)
    if number > 1:  # whose supervisor may have been killed an instant ago
        end_marked(attempt_folder(job.run_dir, number - 1))
    checkpoint_before, oom_kills_before = newest_checkpoint_step(job.run_dir), oom_kills()
    ranks = f"{job.world} rank{'s' if job.world > 1 else ''}"
    if job.cluster is not None:
        ranks += f" on {', '.join(job.cluster.hosts)}"
    progress.note(f"{job.name}: attempt {number}, {ranks}, {newest_checkpoint(job.run_dir)}; logs in {folder / 'logs'}")
    progress.starts_from(checkpoint_before)

    timings, began_unix = Timings.read(job.run_dir), time.time()
    launchers = start(job, number, checkpoint_before, began_unix)
    watching = watch(job.run_dir, number, [0]) if launchers[0].is_rank else None  # else the agent does
    try:
        stop_seconds = wait(launchers, job, number, stops, progress, timings)
    finally:
        if watching is not None:
            watching.end()
        end_all(launchers)
        stuck = end_marked(folder)
        for launcher in launchers:
            if launcher.process.pid not in stuck:
                launcher.process.wait()
    if stuck:
        progress.note(f"{job.name}: processes {stuck} do not die, they hang in the kernel; the node may need a restart")

    status = read_status(job.run_dir, number)
    step = status.get("step")
    ends = [end for launcher in launchers for end in launcher.ends()]
    failures = evidence.rank_failures(folder, ends, step, time.time())
    outcome, host = evidence.outcome(folder), launchers[0].hosts[0]
    result: Literal["done", "stopped", "killed", "failed"]
    if outcome == "done":
        result = "done"
    elif stops.interrupts > 1:
        result = "killed"
    elif outcome == "stopped":
        result = "stopped"
    elif stop_seconds is not None and stop_seconds >= job.shutdown_timeout_seconds:
        result = "failed"
        words = f"did not stop within {job.shutdown_timeout_seconds} s of being asked to and was killed"
        failures.append(RankFailure(None, host, None, 0.0, message=words, step=step))
    elif stops.signal is not None and all(failure.is_consequence for failure in failures):
        result = "stopped"  # before there was anything to save
    else:
        result = "failed"
        if not failures:
            words = "ended without an outcome"
            failures.append(RankFailure(None, host, ends[0].exit_code, time.time(), message=words, step=step))

    if result != "done" and job.cluster is not None and TRANSPORTS[job.cluster.transport].loses_connections:
        wait_for_silent_nodes(folder, ends, 2.0 * job.cluster.lost_after_seconds, stops, progress)
    with contextlib.suppress(OSError):  # the account is less exact without it
        write_json(folder / ENDED_FILE, {"result": result, "ended_unix": time.time(), "status": status})
    checkpoint_after, oom_kills_after = checkpoint_before, oom_kills()
    with contextlib.suppress(CheckpointError):  # a store that is away is what the ranks failed of, and said
        checkpoint_after = newest_checkpoint_step(job.run_dir)
    made_progress = checkpoint_after is not None and (checkpoint_before is None or checkpoint_after > checkpoint_before)
    new_oom_kills = None
    if job.cluster is not None:
        new_oom_kills = evidence.new_oom_kills(folder)
    elif oom_kills_before is not None and oom_kills_after is not None:
        new_oom_kills = oom_kills_after - oom_kills_before
    return Ended(result, tuple(failures), made_progress, new_oom_kills)


# ---------------------------------------------------------------- starting


def start(job: Job, number: int, checkpoint_before: int | None, began_unix: float) -> list[Launcher]:
    """Start the attempt's processes and put their commands on record."""
    folder = attempt_folder(job.run_dir, number)
    keep_reserve(folder)
    known = {"code": code_version(), "checkpoint_before": checkpoint_before, "started_unix": began_unix}
    if job.cluster is None:
        host = socket.gethostname()
        launch = command(job, number, sys.executable, len(os.sched_getaffinity(0)), free_port(), os.getpid())
        launch = with_users_choice(launch, environment.variables())
        content = record(launch, environment.variables(), str(Path.cwd()))
        write_json(folder / "command.json", {**content, **known})
        log, is_rank = launcher_log(folder, host), job.ranks == 1
        return [Launcher({0: host}, launch.arguments, environment.for_child(launch.environment), log, is_rank=is_rank)]

    hosts = job.cluster.hosts
    through = TRANSPORTS[job.cluster.transport].channels(job.cluster)
    shown = node_script(attempt_plan(job, job.cluster, number, redacted_values(job.cluster)))
    content = {"commands": [list(channel.arguments) for channel in through], "node_script": shown.splitlines()}
    write_json(folder / "command.json", {**content, **known})
    script = node_script(attempt_plan(job, job.cluster, number, job.cluster.settings.passed))
    started: list[Launcher] = []
    for channel in through:
        started.append(channel.start({node: hosts[node] for node in channel.nodes}, folder, script))
    return started


def attempt_plan(job: Job, cluster: Cluster, number: int, passed: Mapping[str, str]) -> AttemptPlan:
    """What each node has to do; `passed` are the values of the variables from the submitting shell."""
    first, port = rendezvous(job, cluster, number)
    return AttemptPlan(
        run_dir=job.run_dir,
        attempt=number,
        nodes=len(cluster.hosts),
        ranks_per_node=job.ranks,
        rendezvous=f"{first}:{port}",
        shutdown_timeout_seconds=job.shutdown_timeout_seconds,
        entry=job.entry,
        code=cluster.code,
        settings=cluster.settings.with_passed(passed),
        lost_after_seconds=cluster.lost_after_seconds,
    )


def redacted_values(cluster: Cluster) -> dict[str, str]:
    """What is shown instead of the values from the submitting shell."""
    return dict.fromkeys(cluster.settings.passed, REDACTED)


# ---------------------------------------------------------------- waiting


def wait(
    launchers: Sequence[Launcher], job: Job, number: int, stops: Stops, progress: RunProgress, timings: Timings
) -> float | None:
    """Show progress and pass on a stop until every launcher has ended, or what is left has to be killed.

    Returns:
        How many seconds it took from passing on a stop to the end; None if none was passed on.
    """
    folder, started_unix = attempt_folder(job.run_dir, number), time.time()
    asked_at = failed_at = None
    beat_at = time.monotonic()
    while True:
        ended = _sleep_until_ended(launchers)
        if status := read_status(job.run_dir, number):
            progress.show(Status.from_json(status), time.time())
            timings.observe(status)
            timings.write(job.run_dir)
        now = time.monotonic()
        if ended or stops.interrupts > 1:
            break
        if failed_at is None and _has_failed(launchers, folder):
            failed_at = now
        if failed_at is not None and now - failed_at > PEERS_GRACE_SECONDS:
            break
        if now - beat_at > BEAT_EVERY_SECONDS:
            beat_at = now
            for launcher in launchers:
                launcher.beat()
        if stops.signal is None and job.ends_unix is not None:
            lead = timings.lead_seconds(job.ends_unix - started_unix)
            if time.time() > job.ends_unix - lead:
                stops.signal = f"the time limit comes in {job.ends_unix - time.time():.0f} s"
        if stops.signal is not None and asked_at is None:
            asked_at = now
            for launcher in launchers:
                launcher.stop()
            progress.note(
                f"{job.name}: {stops.signal}: finishing the step and saving a checkpoint (Ctrl-C "
                f"{'again ' if stops.interrupts else 'twice '}kills at once)"
            )
        if asked_at and now - asked_at > job.shutdown_timeout_seconds + AGENT_GRACE_SECONDS:
            break
    return None if asked_at is None else time.monotonic() - asked_at


def _sleep_until_ended(launchers: Sequence[Launcher]) -> bool:
    """Whether all launchers have ended; looks for a short while."""
    deadline = time.monotonic() + POLL_SECONDS
    while any(launcher.running for launcher in launchers):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _has_failed(launchers: Sequence[Launcher], folder: Path) -> bool:
    """Whether one node has failed already, while others may wait for it in vain."""
    if len(launchers) == 1 and len(launchers[0].hosts) == 1:
        return False  # its agent ends by itself
    if any(launcher.has_failed for launcher in launchers):
        return True
    return any(report["failures"] or "agent_error" in report for report in evidence.agent_reports(folder).values())
