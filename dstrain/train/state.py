"""Where a run stands, how that is saved, and how it comes back under another topology."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from dstrain.checkpoint.data_change import differences, on_other_data, permitted
from dstrain.checkpoint.fragments import (
    MOMENTS,
    WEIGHT,
    Piece,
    persistent_buffers,
    resident_fragments,
    saved_tensors,
)
from dstrain.checkpoint.load import Source, choose, load, require_same_parameters
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.stored import DamagedError
from dstrain.checkpoint.verify import describe_skipped
from dstrain.errors import CheckpointError
from dstrain.tasks.task import StepBatch, Task
from dstrain.train.optim import learning_rate
from dstrain.train.runtime import Runtime


@dataclass(frozen=True)
class TrainState:
    """Counters of a run, the same on all ranks, and the cursors of this rank's lanes (None before the first batch)."""

    step: int = 0  # global steps done
    data_step: int = 0  # global batches consumed; ahead of `step` after rollbacks
    bad_samples: int = 0
    rollbacks: int = 0
    cursors: NDArray[np.int64] | None = None
    origin: dict[str, Any] | None = None  # of an imported run, see Manifest
    best: dict[str, Any] | None = None  # evaluation so far, see Manifest
    data_changes: tuple[dict[str, Any], ...] = ()  # see Manifest
    plateau: dict[str, Any] | None = None  # see Manifest

    def after(self, batch: StepBatch, bad_samples: int) -> "TrainState":
        """The state once a batch is consumed; `bad_samples` of all ranks."""
        return replace(
            self,
            step=self.step + 1,
            data_step=batch.data_step + 1,
            bad_samples=self.bad_samples + bad_samples,
            cursors=batch.cursors,
        )


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint of one step will hold of this rank, and what it says of the run.

    `manifest` has no files yet. `pieces` are the memory that the optimizer steps on: they hold still until it does.
    """

    pieces: list[Piece]
    manifest: Manifest


def take_snapshot(runtime: Runtime, task: Task, state: TrainState, scores: dict[str, float]) -> Snapshot:
    """What there is to save at a step, and what an evaluation of it has measured. A collective call."""
    assert state.cursors is not None, "nothing was consumed yet"
    changing = {name for name, _ in persistent_buffers(task.model)}  # in any forward pass
    fragments = resident_fragments(runtime, task.model)
    pieces = [
        (key, tensor.clone() if fragment.parameter in changing else tensor)
        for states in ([WEIGHT], MOMENTS)  # a load goes on with the weights while it reads the rest
        for fragment in fragments
        for key, tensor in fragment.pieces(states)
    ]
    cursors = np.empty((task.lanes, 3), np.int64)
    for rank, own in enumerate(runtime.gather_json(state.cursors.tolist())):
        cursors[rank :: runtime.world_size] = own
    recipe = runtime.recipe
    manifest = Manifest(
        step=state.step,
        data_step=state.data_step,
        optimizer_steps=runtime.applied_steps,
        cursors=cursors.tolist(),
        bad_samples=state.bad_samples,
        rollbacks=state.rollbacks,
        learning_rate=learning_rate(recipe, state.step, task.totals.steps, state.plateau),
        rng={"scheme": "counter", "seed": recipe.train.seed},
        identity=task.identity(),
        topology={
            "world_size": runtime.world_size,
            "zero_stage": recipe.train.zero.stage,
            "precision": recipe.train.precision,
        },
        model_config=model_config(task.model),
        parameters=parameter_shapes(task),
        files={},
        scores=scores,
        origin=state.origin,
        best=state.best,
        data_changes=list(state.data_changes),
        plateau=state.plateau,
    )
    return Snapshot(pieces, manifest)


def resume_state(runtime: Runtime, task: Task, run_dir: Path) -> tuple[TrainState, Source | None]:
    """Load the newest checkpoint that verifies; a fresh state if there is none. A collective call.

    Raises:
        CheckpointError: none verifies, or it belongs to another model, or to other data without permission.
    """
    damaged: list[str] = []
    permission = runtime.from_rank_0(permitted(run_dir) if runtime.rank == 0 else None)
    batch_rows = runtime.recipe.train.global_batch_rows
    while (source := choose(runtime, run_dir, damaged)) is not None:
        manifest = on_other_data(source.manifest, permission, task.identity(), task.lanes, batch_rows)
        source = replace(source, manifest=manifest)
        try:
            return restore_state(runtime, task, source), source
        except DamagedError as error:  # whatever was overwritten, an older one overwrites it again
            damaged = [*source.skipped, describe_skipped(source.folder, [str(error)])]
    return TrainState(), None


def restore_state(runtime: Runtime, task: Task, source: Source) -> TrainState:
    """Load a checkpoint that verifies. A collective call.

    Raises:
        DamagedError: what some rank read of it in a store is not what was written. Raised on all ranks.
        CheckpointError: it belongs to other data or another model.
    """
    manifest = source.manifest
    require_same_identity(source, task.identity())
    require_same_parameters(source.folder, manifest.parameters, parameter_shapes(task))
    load(runtime, source, resident_fragments(runtime, task.model))
    cursors = source.cursors[runtime.rank :: runtime.world_size]
    counters = (manifest.step, manifest.data_step, manifest.bad_samples, manifest.rollbacks)
    changes = tuple(manifest.data_changes)
    return TrainState(*counters, cursors, manifest.origin, manifest.best, changes, manifest.plateau)


def model_config(model: PreTrainedModel) -> dict[str, Any]:
    """The Transformers config that `from_pretrained` would need, as JSON."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(model).__name__]}


def parameter_shapes(task: Task) -> dict[str, dict[str, Any]]:
    """Name → shape and saved states of everything a checkpoint of this task holds, whatever its partitioning."""
    shapes: dict[str, dict[str, Any]] = {}
    for name, tensor in saved_tensors(task.model).items():
        shape = getattr(tensor, "ds_shape", tensor.shape)  # under stage 3 the parameter itself is empty
        states = [WEIGHT, *MOMENTS] if tensor.requires_grad else [WEIGHT]
        shapes[name] = {"shape": list(shape), "states": states}
    return shapes


def require_same_identity(source: Source, identity: dict[str, Any]) -> None:
    """Refuse to go on with other data: the order of rows, and so the run, would be another one."""
    saved = source.manifest.identity
    changed = differences(saved, identity)
    if changed:
        raise CheckpointError(
            f"{source.folder} was saved from other data:\n  "
            + "\n  ".join(changed)
            + "\nput back what changed, start a new run with another --run-dir, or go on with --allow data-change"
        )
