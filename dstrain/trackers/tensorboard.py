"""Curves for TensorBoard, in the run's folder `tensorboard`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.base.tracker import Tracker


class TensorBoard(Tracker):
    """A file of events for each attempt."""

    def __init__(self, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


TRACKER = TensorBoard
