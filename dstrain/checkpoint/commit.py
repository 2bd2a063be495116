"""Saving: every rank writes and hashes its fragments, all vote, rank 0 commits with one step.

    ranks      .staging-step-N/rank-K.safetensors, fsync ──┐
    all        vote: bytes and digest, or the error        ├─ any error: staging goes, older checkpoints stay
    rank 0     manifest.json, fsync, rename to step-N ─────┘
    rank 0     `latest`, then prune

`targets.py` has these steps for a disk, and for a store, where there is no rename.

A crash before the rename leaves a staging folder that nothing reads and the next save removes; after it, a checkpoint.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.base.phases import RankPhase
from dstrain.base.storage import Place
from dstrain.checkpoint.fragments import Piece
from dstrain.checkpoint.manifest import Manifest, run_of, step_of
from dstrain.checkpoint.retention import Retention, prune
from dstrain.checkpoint.targets import OnPhase, Target, target_of, write_small
from dstrain.errors import DISK_FULL, CheckpointError
from dstrain.runtime.runtime import Runtime

LATEST = "latest"  # names the newest checkpoint, for people and scripts; a resume looks for itself
Refusal = dict[str, str]  # {"error": why}, as it travels between ranks


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is there, and its bytes."""

    folder: Place
    total_bytes: int


def commit(
    runtime: Runtime, run_dir: Path, pieces: Sequence[Piece], manifest: Manifest, phase: OnPhase = lambda _: None
) -> Committed:
    """Write and commit a checkpoint. A collective call, on one thread of each rank.

    Args:
        pieces: (key, 1-D tensor) of all that this rank saves.
        manifest: of the checkpoint, as yet without files; rank 0's is used.
        phase: told each phase as it begins, for status files and fault drills.

    Raises:
        CheckpointError: some rank could not write; no committed checkpoint was touched. Raised on all ranks.
    """
    target = target_of(run_dir, manifest.step)
    phase(RankPhase.SAVE_STAGE)
    votes = runtime.gather_votes(_refusal(target.prepare, target.writing) if runtime.rank == 0 else None)
    _require_all(votes, target, runtime)
    phase(RankPhase.SAVE_WRITE)
    name = f"rank-{runtime.rank:05d}.safetensors"
    vote = _write(target, name, pieces)
    phase(RankPhase.SAVE_VOTE)
    votes = runtime.gather_votes({"file": name, **vote})
    _require_all(votes, target, runtime)
    phase(RankPhase.SAVE_COMMIT)
    files = {vote.pop("file"): vote for vote in votes}
    refusal = None
    if runtime.rank == 0:
        text = replace(manifest, files=files).text()
        refusal = _refusal(lambda: target.commit(text, phase), target.final)
    _require_all(runtime.gather_votes(refusal), target, runtime)
    return Committed(target.final, sum(file["bytes"] for file in files.values()))


def conclude(runtime: Runtime, saved: Place, retention: Retention, phase: OnPhase = lambda _: None) -> None:
    """Point `latest` at a committed checkpoint and remove those that need not be kept. A collective call.

    Args:
        retention: which of the checkpoints up to this one remain.

    Raises:
        CheckpointError: rank 0 could not do it; what is committed stays. Raised on all ranks.
    """
    phase(RankPhase.SAVE_LATEST)
    refusal = None
    if runtime.rank == 0:
        latest = saved.parent / LATEST
        refusal = _refusal(lambda: write_small(latest, f"{saved.name}\n"), latest)
    if runtime.rank == 0 and refusal is None:
        phase(RankPhase.SAVE_PRUNE)
        refusal = _refusal(lambda: prune(run_of(saved), retention, up_to_step=step_of(saved) or 0), saved.parent)
    _require_all(runtime.gather_votes(refusal), None, runtime, saved=saved)


def _write(target: Target, name: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write this rank's file. Returns its vote: what the manifest will say of it, or a refusal."""
    try:
        return target.write(name, pieces).entry()
    except OSError as error:
        return {"error": explain_os_error(error, target.writing / name)}


def _refusal(operation: Callable[[], object], path: Place) -> Refusal | None:
    """Do it; why it could not be done, if so."""
    try:
        operation()
    except OSError as error:
        return {"error": explain_os_error(error, path)}
    except CheckpointError as error:
        return {"error": str(error)}
    return None


def _require_all(
    votes: list[dict[str, Any] | None], target: Target | None, runtime: Runtime, *, saved: Place | None = None
) -> None:
    """Go on if no rank refused. Every rank sees the same votes, so that all go on or all raise."""
    refusals = [(rank, vote["error"]) for rank, vote in enumerate(votes) if vote and "error" in vote]
    if not refusals:
        return
    if runtime.rank == 0 and target is not None:
        target.abandon()
    rank, why = refusals[0]
    outcome = "checkpoint not saved" if saved is None else f"{saved} is saved, but not what follows"
    error = CheckpointError(f"{outcome}: rank {rank} of {runtime.world_size}: {why}")
    error.blames_rank = rank
    raise error


def explain_os_error(error: OSError, path: Place) -> str:
    """One line for a person: what failed, where, and what to do."""
    if error.errno in DISK_FULL and isinstance(path, Path):
        existing = next(folder for folder in path.parents if folder.exists())
        return (
            f"no space left for {path} ({shutil.disk_usage(existing).free / 1e6:,.1f} MB free without it); the older "
            f"checkpoints are intact. Free some space or lower checkpoint.keep_last, then start the same command again"
        )
    return f"{path}: {error.strerror or error}; the older checkpoints are intact. Repair that, then start again"
