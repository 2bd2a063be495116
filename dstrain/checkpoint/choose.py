"""Which checkpoint a command means by a path: the one that is named, the run's best, or its newest sound one."""

from pathlib import Path

from dstrain.base.storage import Place
from dstrain.checkpoint.manifest import MANIFEST, Manifest, best_folder, committed, step_of
from dstrain.checkpoint.verify import newest_sound, verify
from dstrain.errors import CheckpointError


def choose_checkpoint(path: Place, step: int | None) -> tuple[Place, list[str]]:
    """The checkpoint that a command means, once it verifies: the one that is named, the run's best, or its newest.

    Args:
        path: a run's folder, or one checkpoint.
        step: of which step; None where the command line does not say.

    Returns:
        The checkpoint, and lines about what was passed over.

    Raises:
        CheckpointError: there is no such checkpoint, or none that verifies.
    """
    remarks = []
    if is_checkpoint(path):
        if step not in (None, step_of(path)):
            raise CheckpointError(f"--step {step}, but {path} is a checkpoint of another step; give the run's folder")
        candidates = [path]
    elif step is not None:
        candidates = [folder for folder in checkpoints_in(path) if step_of(folder) == step]
        if not candidates:
            steps = ", ".join(str(step_of(folder)) for folder in checkpoints_in(path))
            raise CheckpointError(f"--step {step}: {path} has checkpoints of the steps {steps}; give one of them")
    else:
        candidates = checkpoints_in(path)
        best = best_folder(candidates)
        if best is not None and best != candidates[0]:
            newest = step_of(candidates[0])
            remarks.append(f"{best} had the best evaluation (early_stopping); --step {newest} takes the newest")
            candidates = [best, *(folder for folder in candidates if folder != best)]
    checkpoint, skipped = newest_sound(candidates)
    return checkpoint, remarks + skipped


def is_checkpoint(path: Place) -> bool:
    """Whether a path is one checkpoint, and not a run's folder."""
    return (path / MANIFEST).exists() or step_of(path) is not None


def checkpoints_in(run_dir: Place) -> list[Place]:
    """A run's checkpoints, newest first. Raises CheckpointError where there are none."""
    if isinstance(run_dir, Path) and not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such folder; give a run's folder")
    folders = committed(run_dir)
    if not folders:
        raise CheckpointError(f"{run_dir} has no checkpoints; give the folder of a run that has saved one")
    return folders


def choose_sound(path: Place) -> tuple[Place, Manifest]:
    """The checkpoint that is named, or a run's newest, if it verifies. Raises CheckpointError."""
    folder = path if is_checkpoint(path) else checkpoints_in(path)[0]
    if problems := verify(folder):
        raise CheckpointError("\n".join(problems))
    return folder, Manifest.read(folder)
