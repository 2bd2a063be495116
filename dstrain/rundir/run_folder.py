"""The folder of a run: who may write into it, its attempts, and the checkpoint that it would go on from."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dstrain.checkpoint.manifest import MANIFEST, committed, step_of
from dstrain.errors import UserError

_ATTEMPT = re.compile(r"\d{4,}")


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock. The kernel lets go of it when this process ends in whatever way.

    Raises:
        UserError: another process holds it; names its id.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{run_dir} is in use: process {holder} runs it already; stop that one first, or give another --run-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


TRAINING = "dstrain.train.main:run_rank"  # what each rank calls, unless a command says otherwise


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none, or what is there is being written or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def attempt_folder(run_dir: Path, attempt: int) -> Path:
    """Where an attempt keeps its command, logs, errors, outcome and verdict."""
    return run_dir / "attempts" / f"{attempt:04d}"


def node_status_folder(run_dir: Path) -> Path:
    """Where each node of the newest attempt says what its ranks do, see `dstrain.diagnose.watch`."""
    return run_dir / "status" / "nodes"


def next_attempt(run_dir: Path) -> int:
    """One more than the highest number so far, over all invocations; 1 in a new folder."""
    folder = run_dir / "attempts"
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if _ATTEMPT.fullmatch(name)), default=0) + 1


def newest_checkpoint_step(run_dir: Path) -> int | None:
    """The step of the newest committed checkpoint (one that has its manifest); None without any."""
    return max(committed_steps(run_dir), default=None)


def committed_steps(run_dir: Path) -> list[int]:
    """The steps of all committed checkpoints."""
    return sorted(step_of(folder) or 0 for folder in committed(run_dir) if (folder / MANIFEST).exists())


def newest_checkpoint(run_dir: Path) -> str:
    """Where a run would go on, in words."""
    step = newest_checkpoint_step(run_dir)
    return "no checkpoint yet" if step is None else f"newest checkpoint at step {step:,}"
