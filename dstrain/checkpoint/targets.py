"""Where a checkpoint is written, and what commits it there: a rename on a disk, the manifest in a store.

    disk     .staging-step-N/rank-K.safetensors … manifest.json, fsync, then renamed to step-N
    store    step-N/rank-K.safetensors …, each an upload in parts; step-N/manifest.json last of all

What is not committed is not read, and removed by the next save.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from dstrain.base.durable import sync_folder, write_durably
from dstrain.base.phases import RankPhase
from dstrain.base.storage import Place, StoragePath
from dstrain.checkpoint.files import Written, write_safetensors
from dstrain.checkpoint.fragments import Piece
from dstrain.checkpoint.manifest import MANIFEST, checkpoints_of, folder_name, step_of
from dstrain.checkpoint.retention import discard
from dstrain.checkpoint.store_owner import require_owned
from dstrain.errors import CheckpointError

OnPhase = Callable[[RankPhase], None]


class Target(Protocol):
    """One checkpoint that is being written. What goes wrong is an OSError; another run's store, a CheckpointError."""

    @property
    def final(self) -> Place:
        """Where it is once it is committed."""

    @property
    def writing(self) -> Place:
        """Where its files are until then."""

    def prepare(self) -> None:
        """Make room for it, and remove what interrupted saves and removals left. By rank 0, before all else."""

    def write(self, name: str, pieces: Sequence[Piece]) -> Written:
        """Write one rank's file. By every rank."""

    def commit(self, manifest: str, phase: OnPhase) -> None:
        """Make it a checkpoint. By rank 0, once every rank has written."""

    def abandon(self) -> None:
        """Remove what is there of it, as far as that goes. By rank 0."""


def target_of(run_dir: Path, step: int) -> Target:
    """Where the checkpoint of a step goes."""
    where = checkpoints_of(run_dir)
    if isinstance(where, StoragePath):
        return StoreTarget(where / folder_name(step), run_dir)
    return DiskTarget(where / folder_name(step))


class DiskTarget:
    """A local or a shared disk."""

    def __init__(self, final: Path) -> None:
        self.final, self.writing = final, final.with_name(f".staging-{final.name}")

    def prepare(self) -> None:
        """See `Target`."""
        parent = self.final.parent
        if not parent.exists():
            parent.mkdir(parents=True)
            sync_folder(parent.parent)
        for leftover in [*parent.glob(".staging-*"), *parent.glob(".pruned-*")]:
            shutil.rmtree(leftover)
        self.writing.mkdir()

    def write(self, name: str, pieces: Sequence[Piece]) -> Written:
        """See `Target`."""
        return write_safetensors(self.writing / name, pieces)

    def commit(self, manifest: str, phase: OnPhase) -> None:
        """See `Target`."""
        write_durably(self.writing / MANIFEST, manifest)
        phase(RankPhase.SAVE_RENAME)
        if self.final.exists():  # the same step, saved by an earlier attempt, whose checkpoint did not verify
            discard(self.final)
        self.writing.rename(self.final)
        sync_folder(self.final.parent)

    def abandon(self) -> None:
        """See `Target`."""
        shutil.rmtree(self.writing, ignore_errors=True)


class StoreTarget:
    """A store that fsspec knows. Objects appear whole, so that files need no other name until they are committed."""

    def __init__(self, final: StoragePath, run_dir: Path) -> None:
        self.final = self.writing = final
        self._run_dir = run_dir

    def prepare(self) -> None:
        """See `Target`. A checkpoint of this step, which did not verify, stops being one before it is overwritten."""
        require_owned(self.final.parent, self._run_dir)
        for folder in self.final.parent.iterdir():
            if folder == self.final or (step_of(folder) is not None and not (folder / MANIFEST).exists()):
                discard(folder)

    def write(self, name: str, pieces: Sequence[Piece]) -> Written:
        """See `Target`."""
        return write_safetensors(self.final / name, pieces)

    def commit(self, manifest: str, phase: OnPhase) -> None:
        """See `Target`."""
        recipe = self._run_dir / "recipe.yaml"
        if recipe.is_file():  # so that what is in the store can be used by itself
            (self.final.parent / recipe.name).write_text(recipe.read_text(encoding="utf-8"))
        phase(RankPhase.SAVE_RENAME)
        require_owned(self.final.parent, self._run_dir)
        (self.final / MANIFEST).write_text(manifest)

    def abandon(self) -> None:
        """See `Target`."""
        with contextlib.suppress(OSError, CheckpointError):
            require_owned(self.final.parent, self._run_dir)  # or it would be the other run's that goes
            discard(self.final)


def write_small(path: Place, text: str) -> None:
    """Replace a small file or object as a whole."""
    if isinstance(path, StoragePath):
        path.write_text(text)
    else:
        write_durably(path, text)
