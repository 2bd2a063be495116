"""A run that was handed over to a queue: what its batch job needs to know; and many workers of a sweep. Pure."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.transport.profile import Profile, read_profile

FILE_NAME = "submission.json"


@dataclass(frozen=True)
class Submission:
    """One run in a queue."""

    name: str
    run_dir: Path  # absolute
    folder: Path
    profile: Profile
    supervisors_python: str
    ranks: int  # of each node
    nodes: tuple[int, int]  # fewest and most
    max_restarts: int
    code: str  # digest of the source
    chain: int | None  # how many jobs one after another; None: one that requeues itself
    first_attempt: int = 1  # since it was submitted: what failed before, a person has seen

    def as_json(self) -> dict[str, Any]:
        """What `submission.json` holds. There is no secret in it: a profile has none."""
        values = {**vars(self), "run_dir": str(self.run_dir), "folder": str(self.folder)}
        return {**values, "profile": self.profile.model_dump(mode="json")}

    @classmethod
    def read(cls, run_dir: Path) -> "Submission":
        """Back from the run's folder."""
        values = json.loads((run_dir / FILE_NAME).read_text())
        values |= {"run_dir": Path(values["run_dir"]), "folder": Path(values["folder"])}
        values |= {"nodes": tuple(values["nodes"])}
        return cls(**{**values, "profile": read_profile(values["profile"])})


@dataclass(frozen=True)
class WorkerArray:
    """Workers of a sweep, each on a node of its own."""

    name: str
    count: int
    folder: Path  # of the sweep
    log_stem: str  # of each worker's log there; its number and `.log` come after it
    working_folder: Path
    profile: Profile
    python: str | None  # None: the `python` of the profile's virtual environment
    arguments: tuple[str, ...]  # of Python; the worker's number comes after them
