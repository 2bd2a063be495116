"""How far two runs are apart: rows, what was logged of each step, and every element of weights and optimizer states."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dstrain.checkpoint.load import Pieces, require_same_parameters
from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.checkpoint.store import Place
from dstrain.data.ledger import LEDGER_NAME, compare_ledgers
from dstrain.report.runs import read_metrics

STRETCH_ELEMENTS = 1 << 22  # compared at a time
COUNTERS = ("step", "data_step", "optimizer_steps", "learning_rate", "identity")


@dataclass(frozen=True)
class Distance:
    """Of many numbers from as many others: to the bit, by the largest difference, and by norms (difference ÷ first)."""

    bit_equal: bool
    largest: float
    relative: float


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
        loss=_distance(_logged(run_dir, "loss", steps), _logged(reference, "loss", steps)),
        gradient_norm=_distance(_logged(run_dir, "grad_norm", steps), _logged(reference, "grad_norm", steps)),
        states=state_distances(folder, manifest, other, its),
    )


def state_distances(folder: Place, manifest: Manifest, other: Place, its: Manifest) -> dict[str, Distance]:
    """The distance of each saved state between two checkpoints, whatever their topologies."""
    sums: dict[str, _Apart] = {}
    for (_, state), apart in _apart(folder, manifest, other, its):
        sums.setdefault(state, _Apart()).join(apart)
    return {state: apart.distance() for state, apart in sums.items()}


def parameter_distances(
    folder: Place, manifest: Manifest, other: Place, its: Manifest
) -> dict[str, dict[str, Distance]]:
    """Parameter → state → the distance between two checkpoints, whatever their topologies.

    Raises:
        CheckpointError: the two are not of the same model.
    """
    found: dict[str, dict[str, Distance]] = {}
    for (name, state), apart in _apart(folder, manifest, other, its):
        found.setdefault(name, {})[state] = apart.distance()
    return found


def _apart(
    folder: Place, manifest: Manifest, other: Place, its: Manifest
) -> Iterator[tuple[tuple[str, str], "_Apart"]]:
    """How far each (parameter, state) is apart. Needs the memory of `STRETCH_ELEMENTS`, however big the model."""
    require_same_parameters(folder, manifest.parameters, its.parameters)
    ours, theirs = Pieces(folder, manifest), Pieces(other, its)
    for name, about in manifest.parameters.items():
        numel = math.prod(about["shape"])
        for state in (state for state in about["states"] if state in its.parameters[name]["states"]):
            apart = _Apart()
            for offset in range(0, numel, STRETCH_ELEMENTS):
                mine, others = (torch.empty(min(STRETCH_ELEMENTS, numel - offset)) for _ in range(2))
                ours.read_into(mine, name, state, offset)
                theirs.read_into(others, name, state, offset)
                apart.add(mine, others)
            yield (name, state), apart


def _logged(run_dir: Path, name: str, steps: int) -> Tensor:
    values = {entry["step"]: entry[name] for entry in read_metrics(run_dir / "metrics.jsonl").training}
    return torch.tensor([values.get(step, math.nan) for step in range(1, steps + 1)], dtype=torch.float64)


def _distance(mine: Tensor, its: Tensor) -> Distance:
    apart = _Apart()
    apart.add(mine, its)
    return apart.distance()


@dataclass
class _Apart:
    """Sums over pairs of numbers, of which a distance is made."""

    bit_equal: bool = True
    largest: float = 0.0
    squares: float = 0.0
    its_squares: float = 0.0

    def add(self, mine: Tensor, its: Tensor) -> None:
        apart = (mine.double() - its.double()).abs()
        self.bit_equal = self.bit_equal and torch.equal(mine, its)
        if apart.numel():
            self.largest = max(self.largest, float(apart.max()))
        if not bool(torch.isfinite(apart).all()):
            self.largest = math.inf
        self.squares += float(apart.square().sum())
        self.its_squares += float(its.double().square().sum())

    def join(self, other: "_Apart") -> None:
        self.bit_equal = self.bit_equal and other.bit_equal
        self.largest = max(self.largest, other.largest)
        self.squares += other.squares
        self.its_squares += other.its_squares

    def distance(self) -> Distance:
        none = math.inf if self.squares else 0.0
        relative = math.sqrt(self.squares / self.its_squares) if self.its_squares else none
        return Distance(self.bit_equal, self.largest, relative)
