"""How far two runs are apart: rows, what was logged of each step, and every element of weights and optimizer states."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dstrain.checkpoint.distance import COUNTERS, Distance, distance, state_distances
from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.data.ledger import LEDGER_NAME, compare_ledgers
from dstrain.report.runs import read_metrics


@dataclass(frozen=True)
class RunDistance:
    """How far a run is from another at the end of `steps` steps."""

    steps: int
    first_other_rows: int | None  # the first step whose rows differ
    steps_compared: int  # whose rows were
    other_counters: list[str]  # of the manifests
    loss: Distance
    gradient_norm: Distance
    states: dict[str, Distance]  # "weight", "exp_avg", …

    @property
    def same_rows(self) -> bool:
        """Whether both runs have all steps, with the same rows, and ended at the same counters."""
        return self.first_other_rows is None and self.steps_compared == self.steps and not self.other_counters

    @property
    def bit_equal(self) -> bool:
        """Whether nothing tells the two runs apart."""
        return self.same_rows and self.values_equal

    @property
    def values_equal(self) -> bool:
        """Whether losses, gradient norms and all states are equal to the bit."""
        return all(one.bit_equal for one in (self.loss, self.gradient_norm, *self.states.values()))


def run_distance(run_dir: Path, reference: Path, steps: int) -> RunDistance:
    """Compare two runs, both of which logged every step and have a checkpoint after the last.

    Raises:
        CheckpointError: a checkpoint is missing, damaged, or of another model than the other one.
    """
    rows = compare_ledgers(run_dir / LEDGER_NAME, reference / LEDGER_NAME)
    folder, other = checkpoint_folder(run_dir, steps), checkpoint_folder(reference, steps)
    manifest, its = Manifest.read(folder), Manifest.read(other)
    return RunDistance(
        steps=steps,
        first_other_rows=rows.first_difference,
        steps_compared=rows.common_steps,
        other_counters=[name for name in COUNTERS if getattr(manifest, name) != getattr(its, name)],
        loss=distance(_logged(run_dir, "loss", steps), _logged(reference, "loss", steps)),
        gradient_norm=distance(_logged(run_dir, "grad_norm", steps), _logged(reference, "grad_norm", steps)),
        states=state_distances(folder, manifest, other, its),
    )


def _logged(run_dir: Path, name: str, steps: int) -> Tensor:
    values = {entry["step"]: entry[name] for entry in read_metrics(run_dir / "metrics.jsonl").training}
    return torch.tensor([values.get(step, math.nan) for step in range(1, steps + 1)], dtype=torch.float64)
