"""Where the time of an attempt goes, as rank 0 sees it: every moment belongs to exactly one part."""

import json
import os
import time
from pathlib import Path

from dstrain.base.phases import RankPhase
from dstrain.rundir.run_folder import attempt_folder

# computing has waiting for the other ranks in it; saving is what training waits for; starting also has the ending.
ATTEMPT_PARTS = ("computing", "data", "saving", "evaluating", "starting")
_PARTS = {RankPhase.DATA: "data", RankPhase.EVALUATE: "evaluating", RankPhase.SAVED: "saving"} | dict.fromkeys(
    (RankPhase.STARTING, RankPhase.LOAD, RankPhase.DONE, RankPhase.STOPPED), "starting"
)


def part_of(phase: RankPhase) -> str:
    """The part that a phase of the training belongs to."""
    return "saving" if phase.is_step_of_save else _PARTS.get(phase, "computing")


class WallTime:
    """The account of an attempt that began at `started_unix`; until its first phase it is starting."""

    def __init__(self, started_unix: float) -> None:
        self._seconds = dict.fromkeys(ATTEMPT_PARTS, 0.0)
        self._seconds["starting"] = max(0.0, time.time() - started_unix)
        self._part, self._since = "starting", time.monotonic()

    def begin(self, phase: RankPhase) -> None:
        """A phase begins; what has passed belongs to the one before it."""
        self._settle()
        self._part = part_of(phase)

    def seconds(self) -> dict[str, float]:
        """Of each part, up to now."""
        self._settle()
        return {part: round(seconds, 3) for part, seconds in self._seconds.items()}

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._since = now


def started_unix(run_dir: Path, attempt: int) -> float:
    """When the supervisor began an attempt; without one, when this process began."""
    try:
        content = json.loads((attempt_folder(run_dir, attempt) / "command.json").read_text())
        return float(content["started_unix"])
    except (OSError, ValueError, KeyError, TypeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine began
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
