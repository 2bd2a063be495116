"""How long a step and a save take, as seen from outside; and from that how long before its end a run has to be warned.

Kept in the run's folder as `timings.json`, so that the next attempt knows from its beginning. Steps that contain an
evaluation count in full: a stop is noticed at step boundaries only.
"""

import contextlib
import json
import math
from collections import deque
from pathlib import Path
from typing import Any

from dstrain.rundir.attempt_files import write_json

FILE_NAME = "timings.json"
UNKNOWN_LEAD_SECONDS = 600.0  # of a run that has not been measured yet
_KEPT_STEPS, _KEPT_SAVES = 2000, 100
_FIXED_SECONDS = 30.0  # signals, votes, the end of processes
_LARGEST_SHARE = 1 / 3  # of the time limit: a run has to get somewhere as well


class Timings:
    """Durations, taken from the status file as often as it is read."""

    def __init__(
        self,
        step_seconds: list[float] | None = None,
        save_seconds: list[float] | None = None,
        stall_seconds: list[float] | None = None,
    ) -> None:
        self.step_seconds: deque[float] = deque(step_seconds or [], maxlen=_KEPT_STEPS)
        self.save_seconds: deque[float] = deque(save_seconds or [], maxlen=_KEPT_SAVES)  # until committed
        self.stall_seconds: deque[float] = deque(stall_seconds or [], maxlen=_KEPT_SAVES)  # of training, in a save
        self._boundary: dict[str, Any] | None = None  # the first status of the newest step
        self._file: dict[str, float] = {}

    @classmethod
    def read(cls, run_dir: Path) -> "Timings":
        """Those of earlier attempts; none if the file is missing or unreadable."""
        try:
            content = json.loads((run_dir / FILE_NAME).read_text())
            stall = content.get("save_stall_seconds_p99")  # not there before saves went on beside training
            return cls([content["step_seconds_p99"]], [content["save_seconds_p99"]], [] if stall is None else [stall])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, run_dir: Path) -> None:
        """Keep the 99th percentiles, once there is one of each."""
        if self.step_seconds and self.save_seconds:
            values = {"step_seconds_p99": p99(self.step_seconds), "save_seconds_p99": p99(self.save_seconds)}
            if self.stall_seconds:
                values["save_stall_seconds_p99"] = p99(self.stall_seconds)
            if values != self._file:
                with contextlib.suppress(OSError):  # a full disk ends a run at its next save, with a reason; not here
                    write_json(run_dir / FILE_NAME, values)
                    self._file = values

    def observe(self, status: dict[str, Any]) -> None:
        """Take in a status file's content."""
        step, now, saved = status.get("step"), status.get("time_unix"), status.get("last_checkpoint_step")
        if not isinstance(step, int) or not isinstance(now, int | float):
            return
        before = self._boundary
        same_attempt = before is not None and before.get("attempt") == status.get("attempt")
        if before is not None and same_attempt:
            if saved != before.get("last_checkpoint_step") and status.get("save_seconds") is not None:
                self.save_seconds.append(status["save_seconds"])
                self.stall_seconds.append(status["save_stall_seconds"])
            elif step > before["step"] > 0:
                self.step_seconds.append((now - before["time_unix"]) / (step - before["step"]))
        if before is None or not same_attempt or step != before["step"] or saved != before.get("last_checkpoint_step"):
            self._boundary = status

    def lead_seconds(self, limit_seconds: float | None = None) -> float:
        """How long before its end the run has to be asked to stop: two slow steps, two slow saves, and some seconds.

        Args:
            limit_seconds: the whole time that the scheduler grants, of which at most a third is given up.
        """
        lead = UNKNOWN_LEAD_SECONDS
        if self.step_seconds and self.save_seconds:
            lead = 2 * p99(self.step_seconds) + 2 * p99(self.save_seconds) + _FIXED_SECONDS
        return lead if limit_seconds is None else min(lead, limit_seconds * _LARGEST_SHARE)


def p99(values: "deque[float] | list[float]") -> float:
    """The 99th percentile: the smallest value that at least 99 % do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]
