"""One example as a file holds it, whatever the file's format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DATASETS = "datasets://"  # how the location of a data set of `datasets` begins


@dataclass(frozen=True)
class Record:
    """What the file holds at `place` (FILE:LINE). `problem`: why it has no fields; `fatal`: nor has what follows."""

    place: str
    line: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    fatal: bool = False
