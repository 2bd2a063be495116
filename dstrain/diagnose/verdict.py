"""Why an attempt failed, and what to do: pure, from what its ranks left behind.

When one rank dies, its peers lose their connections to it and fail as well, often within the same second and with far
more text. So consequences are told from causes first, and only then is the earliest one taken.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from dstrain.base.typed_json import read_typed
from dstrain.diagnose.causes import is_lasting
from dstrain.diagnose.failure import RankFailure

VERDICT_FILE = "verdict.json"  # in an attempt's folder

OnHang = Literal["restart", "stop"]
Decision = Literal["restart", "restart without the node", "give up", "user error"]


@dataclass(frozen=True)
class Verdict:
    """The first failure of an attempt and what is done about it."""

    attempt: int
    first: RankFailure
    consequences: tuple[RankFailure, ...]
    cause: str
    remedy: str
    decision: Decision
    reason: str

    def as_json(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        return asdict(self)

    @classmethod
    def read(cls, attempt_folder: Path) -> "Verdict | None":
        """The one of an attempt; None if there is none. Raises UserError: the file is damaged."""
        return read_typed(attempt_folder / VERDICT_FILE, TypeAdapter(cls))


@dataclass(frozen=True)
class PastFailure:
    """What the next decision needs to know of an attempt that failed."""

    made_progress: bool  # it committed a newer checkpoint than there was before it
    signature: tuple[object, ...] | None  # equal for two failures that are the same; None: never the same (a signal)


def first_failure(failures: Sequence[RankFailure]) -> tuple[RankFailure, tuple[RankFailure, ...]]:
    """The failure to blame, and the others in order: causes before consequences, then by time, then by rank.

    Time is the supervisor's monotonic clock, where that is known of all: the hosts' wall clocks differ, and jump.
    """
    comparable = all(failure.monotonic is not None for failure in failures)

    def order(failure: RankFailure) -> tuple[bool, float, int]:
        moment = failure.monotonic if comparable and failure.monotonic is not None else failure.time_unix
        return failure.is_consequence, moment, failure.rank or 0

    ordered = sorted(failures, key=order)
    return ordered[0], tuple(ordered[1:])


def signature(failure: RankFailure) -> tuple[object, ...] | None:
    """Identifies a failure that would come again: the same exception with the same message at the same step."""
    if failure.error_type is None or failure.is_consequence:
        return None
    return (failure.error_type, failure.message, failure.step)


def decide(
    first: RankFailure,
    past: Sequence[PastFailure],
    max_restarts: int,
    hosts_left: Sequence[str] = (),
    on_hang: OnHang = "restart",
) -> tuple[Decision, str]:
    """What to do after the failures `past` (oldest first, this one last), and why.

    Restarts are counted since the newest checkpoint: a run that gets further each time may go on, one that does not is
    stopped after `max_restarts`, or after the same exception at the same step came twice.

    Args:
        first: the failure to blame.
        past: the failures so far.
        max_restarts: the limit.
        hosts_left: on which the run could go on without the host of `first`; none: they are too few, or it is needed.
        on_hang: what the profile says of ranks that stand still.
    """
    if first.kind == "user":
        return "user error", "the input has to be corrected first"
    if is_lasting(first):
        return "give up", "every restart would meet it again"
    if first.hang is not None and on_hang == "stop":
        return "give up", "the profile says on_hang: stop"
    without_progress = 0
    for failure in reversed(past):
        without_progress += 1
        if failure.made_progress:
            break
    this = past[-1]
    again = len(past) > 1 and this.signature is not None and this.signature == past[-2].signature
    if again and not this.made_progress:
        return "give up", "the same error came twice at the same step, a restart would meet it again"
    if without_progress > max_restarts:
        return "give up", f"--max-restarts={max_restarts}, and none of these restarts brought a newer checkpoint"
    count = f"{without_progress} of {max_restarts} since the newest checkpoint"
    if first.is_lost_node and hosts_left:
        return "restart without the node", f"{first.host} is left out, {', '.join(hosts_left)} remain; {count}"
    return "restart", count
