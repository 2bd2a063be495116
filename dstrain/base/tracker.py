"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, or what another package brings.

A tracker is one file of `dstrain/trackers`, or an entry point of the group `dstrain.trackers`. `log.trackers` names
them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.base.registry import Registry


class Tracker(ABC):
    """Takes the numbers of one attempt of a run, on rank 0 alone. What it raises ends the run.

    An attempt that resumes may log steps again that one before it has logged; the later numbers hold.
    """

    @abstractmethod
    def __init__(self, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        """Begin an attempt.

        Args:
            run_dir: the run's folder, which is there.
            recipe: the resolved recipe, as in its recipe.yaml.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step. Those of one source of a mixture are called `loss/NAME` and so on."""

    @abstractmethod
    def close(self) -> None:
        """The attempt ends, also by an error."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker", Tracker, "dstrain.trackers")
