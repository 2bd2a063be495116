"""What a run does at this moment, put together from what it leaves in its folder.

run.json (who supervises it), status/HOST.json (rank 0), status/nodes/ (each node's ranks), attempts/ (verdicts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dstrain.base.phases import RankPhase
from dstrain.base.storage import Place
from dstrain.checkpoint.manifest import MANIFEST, checkpoints_of, folder_name
from dstrain.diagnose.verdict import Verdict
from dstrain.diagnose.verdict_text import verdict_line
from dstrain.observe.run_record import RunRecord, State, lock_holder, state_of_run
from dstrain.rundir.attempt_files import read_status
from dstrain.rundir.goodput import run_seconds
from dstrain.rundir.run_folder import (
    attempt_folder,
    newest_checkpoint_step,
    next_attempt,
    node_status_folder,
    read_json,
)

STRAGGLER_SHARE = 0.1  # of a step's time: what a rank needs more than the median to be called one


@dataclass(frozen=True)
class RankStatus:
    """One rank as its node's agent saw it last."""

    rank: int
    pid: int | None
    phase: RankPhase
    step: int
    seconds: float  # since it began the phase
    is_stopped: bool
    own_step_seconds: float | None  # median time of its own in a step
    step_seconds: float | None


@dataclass(frozen=True)
class NodeStatus:
    """One node of the newest attempt."""

    node: int
    host: str
    age_seconds: float
    is_over: bool
    ranks: tuple[RankStatus, ...]


@dataclass(frozen=True)
class Straggler:
    """A rank that makes all others wait."""

    rank: int
    host: str
    own_step_seconds: float
    median_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class RunStatus:
    """Everything that `dstrain status --json` prints. None: not known, or not there yet."""

    run: str
    name: str
    state: State
    exit_code: int | None
    ended_seconds_ago: float | None
    transport: str | None
    supervisor_host: str | None
    supervisor_pid: int | None
    job: str | None
    jobs: tuple[str, ...]
    attempts: int
    last_verdict: str | None
    last_verdict_attempt: int | None
    phase: RankPhase | None
    part: str | None  # of several phases of the recipe, the one that is trained
    step: int
    total_steps: int | None
    loss: float | None
    source_losses: dict[str, float]  # of a mixture
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    run_seconds: dict[str, float]
    nodes: tuple[NodeStatus, ...]
    stragglers: tuple[Straggler, ...]


def run_status(run_dir: Path, now_unix: float) -> RunStatus:
    """Read it all."""
    record, attempt = RunRecord.read(run_dir), next_attempt(run_dir) - 1
    state = state_of_run(run_dir, record, now_unix)
    shown = read_status(run_dir, attempt)
    saved = newest_checkpoint_step(run_dir)
    nodes = read_nodes(run_dir, attempt, now_unix)
    verdict_attempt, verdict = _last_verdict(run_dir, attempt)
    live = state == "running"
    return RunStatus(
        run=str(run_dir),
        name=run_dir.name if record is None else record.name,
        state=state,
        exit_code=None if record is None or live else record.exit_code,
        ended_seconds_ago=None if live or record is None or record.ended_unix is None else now_unix - record.ended_unix,
        transport=None if record is None else record.transport,
        supervisor_host=None if record is None else record.host,
        supervisor_pid=lock_holder(run_dir) if record is None else record.pid,
        job=None if record is None else record.job,
        jobs=() if record is None else record.jobs,
        attempts=attempt,
        last_verdict=verdict,
        last_verdict_attempt=verdict_attempt,
        phase=None if shown.get("phase") is None else RankPhase(shown["phase"]),
        part=shown.get("part"),
        step=shown.get("step") or (saved or 0),
        total_steps=shown.get("total_steps"),
        loss=shown.get("loss"),
        source_losses=shown.get("source_losses") or {},
        tokens_per_second=shown.get("tokens_per_second"),
        seconds_left=shown.get("seconds_left") if live else None,
        checkpoint_step=saved,
        checkpoint_age_seconds=_age(checkpoints_of(run_dir) / folder_name(saved or 0) / MANIFEST, now_unix),
        run_seconds=run_seconds(run_dir, now_unix, is_running=live, is_queued=state == "queued"),
        nodes=nodes,
        stragglers=stragglers(nodes) if live else (),
    )


def read_nodes(run_dir: Path, attempt: int, now_unix: float) -> tuple[NodeStatus, ...]:
    """What the nodes of an attempt wrote last, by their numbers."""
    found = []
    for file in sorted(node_status_folder(run_dir).glob("node-*.json")):
        content = read_json(file)
        if content.get("attempt") != attempt:
            continue
        ranks = [
            RankStatus(
                rank=rank["rank"],
                pid=rank["pid"],
                phase=RankPhase(rank["phase"]),
                step=rank.get("step", 0),
                seconds=rank["seconds"],
                is_stopped=rank.get("is_stopped", False),
                own_step_seconds=rank.get("own_step_seconds"),
                step_seconds=rank.get("step_seconds"),
            )
            for rank in content["ranks"]
        ]
        age = max(0.0, now_unix - content["time_unix"])
        found.append(NodeStatus(content["node"], content["host"], age, content["is_over"], tuple(ranks)))
    return tuple(found)


def stragglers(nodes: Sequence[NodeStatus]) -> tuple[Straggler, ...]:
    """The ranks whose own part of a step is longer than the median by a tenth of the step, slowest first. Pure.

    Its own are reading data and the forward pass: whatever comes after them contains waiting for others. Each rank's
    figure is the median of its last minute, so that a single slow step makes no straggler.
    """
    known = [
        (rank, node.host, rank.own_step_seconds, rank.step_seconds)
        for node in nodes
        for rank in node.ranks
        if rank.own_step_seconds is not None and rank.step_seconds is not None
    ]
    if len(known) < 2:
        return ()
    middle = median(own for _, _, own, _ in known)
    found = [
        Straggler(rank.rank, host, own, middle, step)
        for rank, host, own, step in known
        if own - middle > STRAGGLER_SHARE * step
    ]
    return tuple(sorted(found, key=lambda straggler: -straggler.own_step_seconds))


def _last_verdict(run_dir: Path, attempts: int) -> tuple[int | None, str | None]:
    """The newest verdict, in a line."""
    for number in range(attempts, 0, -1):
        if (verdict := Verdict.read(attempt_folder(run_dir, number))) is not None:
            return number, verdict_line(verdict)
    return None, None


def _age(file: Place, now_unix: float) -> float | None:
    try:
        return max(0.0, now_unix - file.stat().st_mtime)
    except OSError:
        return None
