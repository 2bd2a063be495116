"""Where all the time of a run went, over its attempts: what each accounts for, less what had to be done again.

    attempt 1                   (down)  attempt 2                               attempt 3
    starting ─ … ─ save ─ … ─ ✗         starting ─ … ─ save ─ stopped           starting ─ …
                        └──── lost ────┘                             └─ paused ─┘

What came after the checkpoint with which the next attempt began is lost, and so is the time without any rank after a
failure. Time after a stop, in a queue or at somebody's pleasure, is paused. The parts sum to the whole.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.phases import RankPhase
from dstrain.rundir.attempt_files import read_status
from dstrain.rundir.run_folder import attempt_folder, newest_checkpoint_step, next_attempt, read_json
from dstrain.rundir.wall_time import ATTEMPT_PARTS, part_of

PARTS = (*ATTEMPT_PARTS, "lost", "paused")
ENDED_FILE = "ended.json"  # of an attempt, by its supervisor
_MARK = '"attempt_seconds"'
_ON_PURPOSE = ("done", "stopped")


@dataclass
class Attempt:
    """What is known of one attempt's time."""

    number: int
    started_unix: float
    from_step: int = 0
    points: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)  # (step, seconds so far), in order
    accounted_unix: float = 0.0  # when the last point was taken
    ended_unix: float | None = None  # None: it runs, or nobody was left to see its end
    result: str | None = None  # as `dstrain.supervise.attempt.Ended` has it
    phase: RankPhase = RankPhase.STARTING  # the last one known


def run_seconds(run_dir: Path, now_unix: float, *, is_running: bool, is_queued: bool = False) -> dict[str, float]:
    """Seconds of each of PARTS over all attempts of a run, up to now or to its end."""
    attempts = read_attempts(run_dir, next_attempt(run_dir) - 1)
    if not attempts:
        return dict.fromkeys(PARTS, 0.0)
    last, saved = attempts[-1], newest_checkpoint_step(run_dir) or 0
    if is_running and last.ended_unix is None:
        return split(attempts, now_unix, None)
    if is_running or is_queued:  # between two attempts
        return split(attempts, now_unix, saved)
    return split(attempts, last.ended_unix or max(last.accounted_unix, last.started_unix), saved)


def seconds_before(run_dir: Path, attempt: int, started_unix: float, from_step: int) -> dict[str, float]:
    """Seconds of each of PARTS before an attempt began, which then went on from `from_step`."""
    return split(read_attempts(run_dir, attempt - 1), started_unix, from_step)


def split(attempts: Sequence[Attempt], until_unix: float, next_step: int | None) -> dict[str, float]:
    """Seconds of each of PARTS from the first attempt's start to `until_unix`. Pure.

    Args:
        attempts: in order.
        until_unix: the present, or when what follows them began.
        next_step: at which step the run goes on after the last of them; None: that one is at work.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for index, attempt in enumerate(attempts):
        if index + 1 < len(attempts):
            until, step = attempts[index + 1].started_unix, attempts[index + 1].from_step
            _add(parts, attempt, until, step)
        else:
            _add(parts, attempt, until_unix, next_step)
    return {part: round(seconds, 3) for part, seconds in parts.items()}


def _add(parts: dict[str, float], attempt: Attempt, until_unix: float, next_step: int | None) -> None:
    end = until_unix
    if next_step is not None:
        known = attempt.ended_unix or max(attempt.accounted_unix, attempt.started_unix)
        end = min(known, until_unix)  # clocks of two machines may disagree a little
        parts["paused" if attempt.result in (*_ON_PURPOSE, "killed") else "lost"] += until_unix - end
    step, seconds = attempt.points[-1] if attempt.points else (attempt.from_step, {})
    span, accounted = max(0.0, end - attempt.started_unix), sum(seconds.values())
    scale = span / accounted if accounted > span else 1.0
    rest = span - accounted * scale
    if next_step is None:
        parts[part_of(attempt.phase)] += rest
    else:
        parts["starting" if attempt.result in _ON_PURPOSE else "lost"] += rest
    if next_step is not None and next_step < step:
        kept = seconds_at(attempt.points, next_step)
        parts["lost"] += (accounted - sum(kept.values())) * scale
        seconds = kept
    for part, value in seconds.items():
        parts[part] += value * scale


def seconds_at(points: Sequence[tuple[int, Mapping[str, float]]], step: int) -> dict[str, float]:
    """What an attempt had accounted for when it had made `step`: the last point of that step, or between two."""
    before = max((index for index, point in enumerate(points) if point[0] <= step), default=None)
    if before is None:
        return {}
    made, seconds = points[before]
    if made == step or before + 1 == len(points):
        return dict(seconds)
    later, more = points[before + 1]
    share = (step - made) / (later - made)
    return {part: seconds.get(part, 0.0) + share * (value - seconds.get(part, 0.0)) for part, value in more.items()}


# ---------------------------------------------------------------- reading


def read_attempts(run_dir: Path, last: int) -> list[Attempt]:
    """The attempts up to number `last` of which anything is known."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for line in _lines(run_dir / "metrics.jsonl"):
        lines.setdefault(line["attempt"], []).append(line)
    found = []
    for number in range(1, last + 1):
        folder = attempt_folder(run_dir, number)
        ended = read_json(folder / ENDED_FILE)
        status = ended.get("status") or read_status(run_dir, number)
        accounts = [*lines.get(number, []), *([status] if "attempt_seconds" in status else [])]
        accounts.sort(key=lambda account: sum(account["attempt_seconds"].values()))
        started = read_json(folder / "command.json").get("started_unix")
        if started is None and accounts:
            started = accounts[0]["time_unix"] - sum(accounts[0]["attempt_seconds"].values())
        if started is None:
            continue
        attempt = Attempt(number, started, ended_unix=ended.get("ended_unix"), result=ended.get("result"))
        attempt.phase = RankPhase(status.get("phase", attempt.phase))
        if accounts:
            attempt.from_step, attempt.accounted_unix = accounts[0]["from_step"], accounts[-1]["time_unix"]
            first = {"starting": accounts[0]["attempt_seconds"]["starting"]}
            taken = ((account["step"], account["attempt_seconds"]) for account in accounts)
            attempt.points = [(attempt.from_step, first), *taken]
        else:
            attempt.from_step = read_json(folder / "command.json").get("checkpoint_before") or 0
        found.append(attempt)
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that account for time; a last one that is not whole is passed over."""
    with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if _MARK in line:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
