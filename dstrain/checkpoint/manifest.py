"""The manifest: what a committed checkpoint holds. A folder without a sound one is not a checkpoint."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from dstrain.base.storage import Place, StoragePath
from dstrain.checkpoint.identity import GlobalBatches
from dstrain.errors import CheckpointError

FORMAT = 4  # those before it had cursors: another law of the data
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-(\d{10})")


class OtherFormatError(CheckpointError):
    """A sound checkpoint of another version of dstrain: to be named, not to be passed over as if it were damaged."""


@dataclass(frozen=True)
class Manifest:
    """Everything that is not in the fragments. Plain JSON, readable without torch.

    `step` counts applied or skipped updates; `data_step` counts consumed global batches and runs ahead of it after a
    rollback, which drops the rows that led to it. Which rows come next follows from it and `identity` alone, see
    `identity.py`. `rng` names a scheme and a seed: random numbers are functions of (seed, row number), so there is no
    generator state to save. `model_config` is the Transformers config of what was trained, so that a checkpoint can
    become a model by itself. `origin` says where a run that was imported began ("step", "data_step", "first_row") and
    what from ("source"); None: at step 0, row 0. `scores` are the numbers of an evaluation of this very step, by their
    names in metrics.jsonl; often there was none. `data_changes` are the steps after which the run went on with other
    data, see `data_change.py`.
    """

    step: int
    data_step: int
    optimizer_steps: int
    rollbacks: int
    learning_rate: float
    rng: dict[str, Any]
    identity: dict[str, Any]
    topology: dict[str, Any]
    model_config: dict[str, Any]
    parameters: dict[str, dict[str, Any]]  # name → {"shape", "states"}
    files: dict[str, dict[str, Any]]  # name → what `Written.entry` says of it; "bytes" and "sha256" at least
    scores: dict[str, float] = field(default_factory=dict)
    origin: dict[str, Any] | None = None
    best: dict[str, Any] | None = None  # {"step", "value", "since"}: the best evaluation, and how many came after it
    data_changes: list[dict[str, Any]] = field(default_factory=list)  # {"step", "data_step", "first_row", "changed"}
    plateau: dict[str, Any] | None = None  # as `best`, with "reductions" of the learning rate, where that goes by it
    format: int = FORMAT

    @property
    def began(self) -> dict[str, Any]:
        """The "step", "data_step" and "first_row" since which the run has gone on with the data that it has now."""
        return (self.data_changes or [self.origin or {"step": 0, "data_step": 0, "first_row": 0}])[-1]

    @property
    def data_origin(self) -> tuple[int, int]:
        """The data step and the row with which the data that the run has now began: (0, 0), or a change of data.

        An imported run may begin later than its data.
        """
        change = self.data_changes[-1] if self.data_changes else {"data_step": 0, "first_row": 0}
        return change["data_step"], change["first_row"]

    @property
    def next_row(self) -> int:
        """The row with which the data goes on after this checkpoint."""
        return GlobalBatches(self.identity, self.data_origin).first_row(self.data_step)

    def text(self) -> str:
        """The file's content, with a digest of the rest at its end, so that no byte of it can flip unseen."""
        return _written(asdict(self))

    @classmethod
    def read(cls, folder: Place) -> Self:
        """Read and check the manifest of a checkpoint folder.

        Raises:
            CheckpointError: it is missing or damaged.
            OtherFormatError: it is sound, and of another law of the data or of a newer format.
        """
        path = folder / MANIFEST
        try:
            content = path.read_text(encoding="utf-8")
            stored = json.loads(content)
            manifest, digest = stored["manifest"], stored["sha256"]
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        if _digest(manifest) != digest or _written(manifest) != content:
            raise CheckpointError(f"{path} is damaged: its digest does not match its content")
        if manifest["format"] < FORMAT:
            raise OtherFormatError(
                f"{path} is of another law of the data (checkpoint format {manifest['format']}, this dstrain has "
                f"{FORMAT}): start anew with another --run-dir, or use the version of dstrain that wrote it"
            )
        if manifest["format"] > FORMAT:
            raise OtherFormatError(
                f"{path} is of checkpoint format {manifest['format']}, this dstrain reads format {FORMAT}; "
                f"use the version of dstrain that wrote it, or start anew with another --run-dir"
            )
        return cls(**manifest)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _written(manifest: dict[str, Any]) -> str:
    return json.dumps({"manifest": manifest, "sha256": _digest(manifest)}, indent=1) + "\n"


def checkpoints_of(run_dir: Place) -> Place:
    """Where a run's checkpoints are: in its folder, or where `checkpoint.storage` of its recipe says.

    Of a store, `run_dir` may also be that place itself.
    """
    if isinstance(run_dir, StoragePath):
        return run_dir
    storage = storage_of(run_dir)
    return run_dir / "checkpoints" if storage is None else StoragePath(storage)


def run_of(folder: Place) -> Place:
    """The run that a checkpoint is of: its folder, or its place in a store. Inverse of `checkpoints_of`."""
    return folder.parent if isinstance(folder, StoragePath) else folder.resolve().parent.parent


def storage_of(run_dir: Path) -> str | None:
    """The store that the recipe in a run's folder names; None: there is none, or no such recipe."""
    try:
        recipe = yaml.load((run_dir / "recipe.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        storage = recipe["checkpoint"]["storage"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    return storage if isinstance(storage, str) else None


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be, in the folder of a run without a store."""
    return run_dir / "checkpoints" / folder_name(step)


def folder_name(step: int) -> str:
    """What the folder of a step's checkpoint is called."""
    return f"step-{step:010d}"


def step_of(folder: Place) -> int | None:
    """The step that a folder's name stands for; None if it is not a checkpoint's name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def committed(run_dir: Place) -> list[Place]:
    """Committed checkpoints, newest first.

    On a disk the rename that commits comes last, so a name is a promise; in a store it is the manifest.

    Raises:
        CheckpointError: the store cannot be asked.
    """
    where = checkpoints_of(run_dir)
    try:
        found: list[Place] = [folder for folder in where.iterdir() if step_of(folder) is not None]
        found.sort(key=lambda folder: folder.name, reverse=True)
        if isinstance(where, StoragePath):
            return [folder for folder in found if (folder / MANIFEST).exists()]
        return [folder for folder in found if folder.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror or error}") from error


def newest_manifest(run_dir: Place) -> Manifest | None:
    """The newest manifest of a run that can be read; None without any. Damaged ones are passed over, as a resume does.

    Raises:
        OtherFormatError: the newest sound one is of another version.
    """
    for folder in committed(run_dir):
        try:
            return Manifest.read(folder)
        except OtherFormatError:
            raise
        except CheckpointError:
            continue
    return None


def best_folder(folders: list[Place]) -> Place | None:
    """Which of some checkpoints of a run, newest first, had the best evaluation; None where nothing was chosen by."""
    if not folders:
        return None
    try:
        best = Manifest.read(folders[0]).best
    except CheckpointError:
        return None
    return next((folder for folder in folders if best is not None and step_of(folder) == best["step"]), None)
