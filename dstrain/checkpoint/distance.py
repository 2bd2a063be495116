"""How far two checkpoints are apart: every element of weights and optimizer states, whatever their topologies."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.base.storage import Place
from dstrain.checkpoint.load import Pieces, require_same_parameters
from dstrain.checkpoint.manifest import Manifest

STRETCH_ELEMENTS = 1 << 22  # compared at a time
COUNTERS = ("step", "data_step", "optimizer_steps", "learning_rate", "identity")


@dataclass(frozen=True)
class Distance:
    """Of many numbers from as many others: to the bit, by the largest difference, and by norms (difference ÷ first)."""

    bit_equal: bool
    largest: float
    relative: float


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


def distance(mine: Tensor, its: Tensor) -> Distance:
    """Of some numbers from as many others."""
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
