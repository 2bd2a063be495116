"""Which checkpoints of a run are kept: the last ones, every so many steps, the best; and the removal of the others.

The one that `early_stopping` has chosen so far is always kept: the run ends with it.

Only sound ones count, so that no damaged checkpoint stands in for a good one: the manifest is whole, every file has its
size, and no `ckpt verify` has found the contrary. That the content is right was voted on before each was committed.
Damaged ones are left where they are.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from dstrain.base.storage import Place, StoragePath, sizes_in
from dstrain.checkpoint.manifest import MANIFEST, Manifest, committed, step_of
from dstrain.checkpoint.records import Records
from dstrain.errors import CheckpointError
from dstrain.recipe.schema import Recipe
from dstrain.recipe.training import KeepBest

_BETTER_IF_LOW = ("loss", "perplexity", "error")


@dataclass(frozen=True)
class Retention:
    """The rules. A checkpoint that any of them keeps is kept."""

    keep_last: int
    keep_every: int | None = None
    keep_best: KeepBest = field(default_factory=KeepBest)

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Those of a recipe."""
        return cls(recipe.checkpoint.keep_last, recipe.checkpoint.keep_every, recipe.checkpoint.keep_best)


@dataclass(frozen=True)
class Candidate:
    """A sound checkpoint, and what its evaluation measured."""

    step: int
    scores: dict[str, float]
    chosen_step: int | None = None  # by early_stopping, when this one was saved


def reasons_to_keep(candidates: Sequence[Candidate], retention: Retention) -> dict[int, str]:
    """Step → why it is kept. Pure.

    Args:
        candidates: newest first.
        retention: the rules.
    """
    kept = {one.step: f"one of the last {retention.keep_last}" for one in candidates[: retention.keep_last]}
    for one in candidates:
        if retention.keep_every is not None and one.step % retention.keep_every == 0:
            kept.setdefault(one.step, f"every {retention.keep_every:,} steps")
    for one in candidates:
        if one.step == candidates[0].chosen_step:
            kept.setdefault(one.step, "best evaluation, by early_stopping")
    if retention.keep_best.metric is not None:
        metric = f"valid_{retention.keep_best.metric}"
        scored = [one for one in candidates if metric in one.scores]
        sign = 1 if lowest_is_best(retention.keep_best) else -1
        scored.sort(key=lambda one: (sign * one.scores[metric], -one.step))
        for one in scored[: retention.keep_best.count]:
            kept.setdefault(one.step, f"best {metric}: {one.scores[metric]:.6g}")
    return kept


def lowest_is_best(best: KeepBest) -> bool:
    """Whether a low value of the metric is a good one."""
    if best.best is not None:
        return best.best == "lowest"
    if best.metric is None:
        return False
    metric, _, _source = best.metric.partition(".")
    return metric.endswith(_BETTER_IF_LOW)


def examined(run_dir: Place, up_to_step: int) -> tuple[list[Candidate], list[Place]]:
    """Sound checkpoints up to a step, newest first, and the folders of those that are damaged.

    `up_to_step` is that of a checkpoint known to be sound. Later ones were found damaged when the run was resumed, or
    they would not be later. They stay until the run saves their step.
    """
    records, sound, damaged = Records.read(run_dir), [], []
    for folder in committed(run_dir):
        step = step_of(folder)
        if step is None or step > up_to_step:
            continue
        try:
            manifest, sizes = Manifest.read(folder), sizes_in(folder)
            whole = all(sizes.get(name) == about["bytes"] for name, about in manifest.files.items())
            if not whole or records.of(folder).found_damaged:
                damaged.append(folder)
            else:
                chosen_step = None if manifest.best is None else manifest.best["step"]
                sound.append(Candidate(step, manifest.scores, chosen_step))
        except (CheckpointError, OSError):
            damaged.append(folder)
    return sound, damaged


def prune(run_dir: Place, retention: Retention, *, up_to_step: int) -> list[Place]:
    """Remove the sound checkpoints up to a step that no rule keeps; returns them, newest first. Raises OSError."""
    candidates, _ = examined(run_dir, up_to_step)
    kept = reasons_to_keep(candidates, retention)
    steps = {one.step for one in candidates} - kept.keys()
    doomed = [folder for folder in committed(run_dir) if step_of(folder) in steps]
    for folder in doomed:
        discard(folder)
    return doomed


def discard(folder: Place) -> None:
    """Remove a committed checkpoint. First of all it stops being one: what is half gone must not look like one."""
    if isinstance(folder, StoragePath):
        (folder / MANIFEST).remove()
        folder.remove_tree()
        return
    gone = folder.with_name(f".pruned-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    try:
        folder.rename(gone)
    except FileNotFoundError:  # `dstrain ckpt prune` beside a run: the other one was first
        return
    shutil.rmtree(gone, ignore_errors=True)
