"""What `dstrain status` prints for people. Pure."""

from collections import Counter
from collections.abc import Iterator

from dstrain.base import durations
from dstrain.errors import EXIT_DONE, EXIT_RESTART_ME
from dstrain.observe.progress import how_far
from dstrain.observe.status import NodeStatus, RankStatus, RunStatus

MOST_RANKS_SHOWN = 16  # of a node; more are counted by their phases
SILENT_NODE_SECONDS = 20.0
PART_NAMES = {
    "computing": "computing",
    "data": "waiting for data",
    "saving": "saving",
    "evaluating": "evaluating",
    "starting": "starting",
    "lost": "lost to restarts",
    "paused": "paused",
}


def page(status: RunStatus) -> str:
    """All of it, without a newline at its end."""
    lines = [f"{status.name}  {status.run}"]
    lines.append(_line("state", _state(status)))
    if status.part is not None:
        lines.append(_line("part", status.part))
    lines += [_line("step", _step(status)), _line("saved", _saved(status))]
    lines.append(_line("attempts", str(status.attempts)))
    if total := sum(status.run_seconds.values()):
        lines.append(_line("time", _time(status.run_seconds, total)))
    if status.last_verdict is not None:
        lines.append(_line("verdict", f"attempt {status.last_verdict_attempt}: {status.last_verdict}"))
    if status.state == "running":
        for straggler in status.stragglers:
            own, middle = straggler.own_step_seconds, straggler.median_seconds
            words = f"{own:.3g} s of its own in a step of {straggler.step_seconds:.3g} s, the median is {middle:.3g} s"
            lines.append(_line("straggler", f"rank {straggler.rank} on {straggler.host}: {words}"))
        lines += _nodes(status)
    return "\n".join(lines)


def _state(status: RunStatus) -> str:
    if status.state == "running":
        where = (
            f"{_count(sum(len(node.ranks) for node in status.nodes), 'rank')} on {_count(len(status.nodes), 'node')}"
        )
        return f"{status.phase or 'starting'}; {where}; {_supervisor(status)}"
    if status.state == "queued":
        return f"waits in SLURM's queue, job {', '.join(status.jobs)}"
    if status.state == "lost" and status.supervisor_pid is None:
        return f"lost: job {', '.join(status.jobs)} is not in SLURM's queue any more; the same `dstrain run` goes on"
    if status.state == "lost":
        return f"lost: {_supervisor(status)} is gone and has not said how; the same `dstrain run` goes on"
    if status.state == "silent":
        return f"silent: {_supervisor(status)} cannot be seen from here, and nothing was heard for a minute"
    ago = "" if status.ended_seconds_ago is None else f" {durations.clock(status.ended_seconds_ago)} ago"
    if status.exit_code == EXIT_RESTART_ME:
        return f"stopped{ago}; the same `dstrain run` goes on"
    if status.exit_code in (EXIT_DONE, None):
        return f"{'ended' if status.exit_code is None else 'done'}{ago}"
    return f"failed{ago}, exit code {status.exit_code}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _supervisor(status: RunStatus) -> str:
    job = f" job {status.job}" if status.job is not None else ""
    where = f" on {status.supervisor_host}" if status.supervisor_host is not None else ""
    return f"{status.transport or 'plain script'}{job}, supervisor {status.supervisor_pid}{where}"


def _step(status: RunStatus) -> str:
    known = status.step, status.total_steps, status.loss, status.tokens_per_second, status.seconds_left
    return ", ".join(how_far(*known, status.source_losses))


def _time(seconds: dict[str, float], total: float) -> str:
    shares = (f"{PART_NAMES[part]} {100 * value / total:.1f} %" for part, value in seconds.items() if value)
    return f"{durations.clock(total)}: {', '.join(shares)}"


def _saved(status: RunStatus) -> str:
    if status.checkpoint_step is None:
        return "no checkpoint yet"
    age = "" if status.checkpoint_age_seconds is None else f", {durations.clock(status.checkpoint_age_seconds)} ago"
    return f"step {status.checkpoint_step:,}{age}"


def _nodes(status: RunStatus) -> Iterator[str]:
    for node in status.nodes:
        yield ""
        yield f"node {node.node}  {node.host}{_silence(node)}"
        if len(node.ranks) <= MOST_RANKS_SHOWN:
            yield "  rank      pid  phase                   for        step  own s/step"
            yield from (_rank(rank) for rank in node.ranks)
        else:
            counted = Counter(rank.phase for rank in node.ranks).most_common()
            oldest = max(node.ranks, key=lambda rank: rank.seconds)
            yield f"  {len(node.ranks)} ranks: " + ", ".join(f"{phase} {count}" for phase, count in counted)
            yield f"  longest: rank {oldest.rank}, {_phase(oldest)} for {durations.clock(oldest.seconds)}"


def _silence(node: NodeStatus) -> str:
    return f"  (no word for {durations.clock(node.age_seconds)})" if node.age_seconds > SILENT_NODE_SECONDS else ""


def _rank(rank: RankStatus) -> str:
    pid = "–" if rank.pid is None else str(rank.pid)
    own = "–" if rank.own_step_seconds is None else f"{rank.own_step_seconds:.3g}"
    seconds = durations.clock(rank.seconds)
    return f"  {rank.rank:>4}  {pid:>7}  {_phase(rank):<18}  {seconds:>7}  {rank.step:>10,}  {own:>10}"


def _phase(rank: RankStatus) -> str:
    return f"{rank.phase} (SIGSTOP)" if rank.is_stopped else rank.phase


def _line(name: str, text: str) -> str:
    return f"{name:<10} {text}"
