"""What is known of another program's checkpoint."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class ForeignPiece:
    """Elements of one state of a flattened parameter, from `offset` on."""

    parameter: str
    state: str
    offset: int
    values: Tensor  # 1-D

    @classmethod
    def of(cls, parameter: str, state: str, values: Tensor, offset: int = 0) -> Self:
        """From a tensor of any shape, as it comes out of a file."""
        return cls(parameter, state, offset, values.detach().reshape(-1))


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint.

    `shapes` of parameters and buffers, None where only the number of elements is known (from the pieces); `parts` are
    the pieces as they lie together in files, and become a file each.
    """

    kind: str  # in words
    step: int
    optimizer_steps: int
    world_size: int
    zero_stage: int
    precision: str
    shapes: dict[str, list[int] | None]
    parts: list[list[ForeignPiece]]
