"""Where a run stands, how that is saved, and how it comes back under another topology."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dstrain.checkpoint.data_change import DATA_CHANGE, changes, on_other_data, permitted
from dstrain.checkpoint.fragments import (
    WEIGHT,
    Piece,
    persistent_buffers,
    resident_fragments,
    saved_tensors,
)
from dstrain.checkpoint.load import Source, choose, load, require_same_computation, require_same_parameters
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.stored import DamagedError
from dstrain.checkpoint.verify import describe_skipped
from dstrain.errors import CheckpointError
from dstrain.plan.schedule import learning_rate
from dstrain.runtime.deepspeed_state import whole_shape
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import StepBatch, Task


@dataclass(frozen=True)
class TrainState:
    """Counters of a run, the same on all ranks. Which rows come next follows from `data_step` and the task alone."""

    step: int = 0  # global steps done
    data_step: int = 0  # global batches consumed; ahead of `step` after rollbacks
    rollbacks: int = 0
    origin: dict[str, Any] | None = None  # of an imported run, see Manifest
    best: dict[str, Any] | None = None  # evaluation so far, see Manifest
    data_changes: tuple[dict[str, Any], ...] = ()  # see Manifest
    plateau: dict[str, Any] | None = None  # see Manifest

    def after(self, batch: StepBatch) -> "TrainState":
        """The state once a batch is consumed."""
        return replace(self, step=self.step + 1, data_step=batch.data_step + 1)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint of one step will hold of this rank, and what it says of the run.

    `manifest` has no files yet. `pieces` are the memory that the optimizer steps on: they hold still until it does.
    """

    pieces: list[Piece]
    manifest: Manifest


def take_snapshot(runtime: Runtime, task: Task, state: TrainState, scores: dict[str, float]) -> Snapshot:
    """What there is to save at a step, and what an evaluation of it has measured."""
    changing = {name for name, _ in persistent_buffers(task.model)}  # in any forward pass
    fragments = resident_fragments(runtime, task.model)
    pieces = [
        (key, tensor.clone() if fragment.parameter in changing else tensor)
        for is_weight in (True, False)  # a load goes on with the weights while it reads the rest
        for fragment in fragments
        for key, tensor in fragment.pieces(weights=is_weight, optimizer=not is_weight)
    ]
    recipe = runtime.recipe
    manifest = Manifest(
        step=state.step,
        data_step=state.data_step,
        optimizer_steps=runtime.applied_steps,
        rollbacks=state.rollbacks,
        learning_rate=learning_rate(recipe, task.totals.timeline, state.step, state.plateau),
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
    while (source := choose(runtime, run_dir, damaged)) is not None:
        manifest = on_other_data(source.manifest, permission, task.identity())
        source = replace(source, manifest=manifest)
        try:
            return restore_state(runtime, task, source), source
        except DamagedError as error:  # whatever was overwritten, an older one overwrites it again
            damaged = [*source.skipped, describe_skipped(source.folder, [str(error)])]
    task.origin = (0, 0)
    return TrainState(), None


def restore_state(runtime: Runtime, task: Task, source: Source) -> TrainState:
    """Load a checkpoint that verifies, and tell the task where its data began. A collective call.

    Raises:
        DamagedError: what some rank read of it is not what was written. Raised on all ranks.
        CheckpointError: it belongs to other data or another model.
    """
    manifest = source.manifest
    require_same_identity(source, task.identity())
    require_same_parameters(source.folder, manifest.parameters, parameter_shapes(task))
    require_same_computation(source.folder, manifest.model_config, model_config(task.model))
    load(runtime, source, resident_fragments(runtime, task.model))
    task.origin = manifest.data_origin
    task.enter_phase(task.phase_at(max(manifest.data_step - 1, 0)))  # the model is that of the last step
    return TrainState(
        step=manifest.step,
        data_step=manifest.data_step,
        rollbacks=manifest.rollbacks,
        origin=manifest.origin,
        best=manifest.best,
        data_changes=tuple(manifest.data_changes),
        plateau=manifest.plateau,
    )


def model_config(model: PreTrainedModel) -> dict[str, Any]:
    """The Transformers config that `from_pretrained` would need, as JSON."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(model).__name__]}


def parameter_shapes(task: Task) -> dict[str, dict[str, Any]]:
    """Name → shape and saved states of everything a checkpoint of this task holds, whatever its partitioning."""
    shapes: dict[str, dict[str, Any]] = {}
    trained_states = [WEIGHT, *task.runtime.optimizer.states]
    for name, tensor in saved_tensors(task.model).items():
        states = trained_states if tensor.requires_grad else [WEIGHT]
        shapes[name] = {"shape": whole_shape(tensor), "states": states}
    return shapes


def require_same_identity(source: Source, identity: dict[str, Any]) -> None:
    """Refuse to go on with other data: the rows up to the checkpoint, and so the run, would be other ones."""
    changed = changes(source.manifest, identity)
    if changed:
        other_way = all(difference.is_of_data for difference in changed)
        raise CheckpointError(
            f"{source.folder} was saved from other data:\n  "
            + "\n  ".join(map(str, changed))
            + "\nput back what changed, or start a new run with another --run-dir"
            + (f"; or go on with --allow {DATA_CHANGE}" if other_way else "")
        )
