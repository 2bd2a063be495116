"""What an attempt left behind in its folder, read back: its outcome, and who failed how."""

import json
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from dstrain.base.phases import RankPhase
from dstrain.base.processes import kernel_oom_victims
from dstrain.base.typed_json import read_typed
from dstrain.diagnose.failure import Hang, RankFailure
from dstrain.errors import EXIT_FAILURE, EXIT_USER_ERROR
from dstrain.transport.launchers import LauncherEnd, launcher_log

LOG_TAIL_LINES = 12
_TAIL_BYTES = 16_384
_LINE_CHARACTERS = 160
# By SIGTERM before the agent could listen to it; the second is how ssh and srun pass it on.
_ASKED_TO_END = (-signal.SIGTERM, 128 + signal.SIGTERM)


def outcome(attempt_folder: Path) -> str | None:
    """ "done" or "stopped" as rank 0 wrote it; None if it never got that far."""
    content = _json(attempt_folder / "outcome.json")
    return content["outcome"] if content else None


@dataclass(frozen=True)
class Clocks:
    """How far the monotonic clocks of the hosts are ahead of this one, by their names; and this host's own clocks."""

    ahead_seconds: Mapping[str, float]
    monotonic_less_unix: float

    @classmethod
    def of(cls, reports: Iterable[Mapping[str, Any]]) -> Self:
        """From what the agents found (see `dstrain.transport.control`)."""
        known = {
            report["host"]: report["clock_ahead_seconds"]
            for report in reports
            if report.get("clock_ahead_seconds") is not None
        }
        return cls({**known, socket.gethostname(): 0.0}, time.monotonic() - time.time())

    def began(self, attempt_folder: Path) -> float:
        """When an attempt began, by this machine's monotonic clock; 0 if that is not on record."""
        command = attempt_folder / "command.json"
        return command.stat().st_mtime + self.monotonic_less_unix if command.exists() else 0.0

    def here(self, host: str | None, monotonic: float | None, time_unix: float) -> float:
        """A moment on a host, by this machine's monotonic clock; through wall clocks where there is nothing better."""
        if host is not None and host in self.ahead_seconds and monotonic is not None:
            return monotonic - self.ahead_seconds[host]
        return time_unix + self.monotonic_less_unix


def rank_failures(
    attempt_folder: Path, launchers: Sequence[LauncherEnd], step: int | None, ended_unix: float
) -> list[RankFailure]:
    """Every failure of the attempt; empty if nothing failed.

    Args:
        attempt_folder: `attempts/NNNN` of the run.
        launchers: how each of them ended.
        step: the newest step known, for ranks that could not tell theirs.
        ended_unix: when the last launcher ended.
    """
    hosts = {node: host for launcher in launchers for node, host in launcher.hosts.items()}
    reports = agent_reports(attempt_folder)
    clocks = Clocks.of(reports.values())
    oom_victims = {(socket.gethostname(), pid) for pid in kernel_oom_victims(clocks.began(attempt_folder)) or ()}
    exit_codes: dict[int, tuple[int | None, float, str]] = {}
    for node, report in reports.items():
        oom_victims |= {(report["host"], pid) for pid in report.get("oom_victims") or ()}
        for failure in report["failures"]:
            host = hosts.get(node, report["host"])
            exit_codes[failure["rank"]] = (failure["exit_code"], float(failure["time_unix"]), host)
    user_errors = [
        RankFailure(
            rank=None,
            host=hosts.get(node, ""),
            exit_code=EXIT_USER_ERROR,
            time_unix=ended_unix,
            kind="user",
            message=report["user_error"],
            monotonic=clocks.here(None, None, ended_unix),
        )
        for node, report in sorted(reports.items())
        if "user_error" in report
    ]
    agent_errors = [
        RankFailure(
            rank=None,
            host=hosts.get(node, report["host"]),
            exit_code=EXIT_FAILURE,
            time_unix=report["time_unix"],
            kind="exception",
            error_type=report["agent_error"]["type"],
            message=report["agent_error"]["message"],
            monotonic=clocks.here(None, None, report["time_unix"]),
        )
        for node, report in sorted(reports.items())
        if "agent_error" in report
    ]
    for launcher in launchers:
        if launcher.is_rank and launcher.exit_code != 0:
            exit_codes[0] = (launcher.exit_code, ended_unix, launcher.hosts[0])

    last_words = {}
    for file in sorted((attempt_folder / "errors").glob("rank-*.json")):
        if error := _json(file):
            last_words[error["rank"]] = error

    found = [*user_errors, *agent_errors]
    for rank in sorted(exit_codes.keys() | last_words.keys()):
        error = last_words.get(rank)
        code, time_unix, host = exit_codes.get(rank, (None, ended_unix, error["host"] if error else ""))
        log = _rank_log(attempt_folder, rank)
        process = _json(attempt_folder / "ranks" / f"rank-{rank:05d}.json") or {}
        hang = None if error else read_hang(attempt_folder, rank)
        if error:
            moment = clocks.here(error["host"], error["monotonic"], error["time_unix"])
        else:
            moment = clocks.here(process.get("host"), None, time_unix)
        found.append(
            RankFailure(
                rank=rank,
                host=host,
                exit_code=code,
                time_unix=error["time_unix"] if error else time_unix,
                kind=error["kind"] if error else None,
                error_type=error["type"] if error else None,
                message=error["message"] if error else "",
                phase=_phase(error) if error else hang.phase if hang else None,
                step=error["step"] if error else hang.step if hang else step,
                log=str(log),
                log_tail=log_tail(log),
                monotonic=moment,
                blames_rank=error.get("blames_rank") if error else None,
                hang=hang,
                data_process_exit_code=error.get("data_process_exit_code") if error else None,
                out_of_memory=(process.get("host"), process.get("pid")) in oom_victims,
            )
        )
    for launcher in launchers:
        if launcher.exit_code in (0, *_ASKED_TO_END) or (launcher.is_rank and found):
            continue
        for node, host in launcher.hosts.items():
            cut_off = launcher.is_lost and reports.get(node, {}).get("lost_supervisor")
            if node not in reports or cut_off:  # else the agent has told all there is, and the exit code repeats it
                log = launcher_log(attempt_folder, launcher.hosts[min(launcher.hosts)])
                moment = clocks.here(None, None, ended_unix)
                failure = RankFailure(
                    None, host, launcher.exit_code, ended_unix, step=step, log=str(log), monotonic=moment
                )
                lost = len(launcher.hosts) > 1 or launcher.is_lost
                words = "its agent left no report: the node, or the way to it, was lost" if lost else ""
                found.append(replace(failure, message=words, log_tail=log_tail(log)))
    return found


def read_hang(attempt_folder: Path, rank: int) -> Hang | None:
    """What the watch of a rank's node wrote as it killed it; None if it did not. Raises UserError: damaged."""
    return read_typed(hang_file(attempt_folder, rank), TypeAdapter(Hang))


def hang_file(attempt_folder: Path, rank: int) -> Path:
    """Where the watch writes that."""
    return attempt_folder / "hangs" / f"rank-{rank:05d}.json"


def _phase(error: Mapping[str, Any]) -> RankPhase | None:
    return None if error["phase"] is None else RankPhase(error["phase"])


def agent_reports(attempt_folder: Path) -> dict[int, dict[str, Any]]:
    """What the agents have written so far, by the numbers of their nodes."""
    files = (attempt_folder / "agents").glob("node-*.json")
    return {report["node"]: report for file in sorted(files) if (report := _json(file))}


def new_oom_kills(attempt_folder: Path) -> int | None:
    """How many processes the kernels of the nodes have killed for memory; None if no agent could tell."""
    known = [report["new_oom_kills"] for report in agent_reports(attempt_folder).values() if "new_oom_kills" in report]
    return sum(known) if known else None


def _rank_log(attempt_folder: Path, rank: int) -> Path:
    """Where the rank printed to; the host's folder is found, as a node may call itself otherwise than others do."""
    name = f"rank-{rank:05d}.log"
    return next(iter(sorted((attempt_folder / "logs").glob(f"*/{name}"))), attempt_folder / "logs" / name)


def log_tail(log: Path) -> tuple[str, ...]:
    """The last lines of a log, over-long ones cut; () if there is none."""
    lines = [line.rstrip()[:_LINE_CHARACTERS] for line in log_end(log, _TAIL_BYTES).splitlines()]
    return tuple(line for line in lines if line)[-LOG_TAIL_LINES:]


def log_end(log: Path, most_bytes: int) -> str:
    """The last bytes of a log as text; empty if there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - most_bytes))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
