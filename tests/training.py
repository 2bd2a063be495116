"""Runs on a rank: many small trainings in one process group, since starting ranks is what takes the time."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dstrain.checkpoint.fragments import resident_fragments
from dstrain.data.rows import StepRows
from dstrain.data.spec import StreamSpec
from dstrain.plan import corpus_tokens
from dstrain.plan.streams import training_stream
from dstrain.plan.timeline import make_timeline
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import StepBatch, Task
from dstrain.train.main import build_task, prepare

Pieces = dict[tuple[str, int], NDArray[np.float32]]  # (parameter, first element) → elements


@contextmanager
def training(
    recipe: Recipe, wrap: Callable[[nn.Module], nn.Module] = lambda module: module
) -> Iterator[tuple[Runtime, Task]]:
    """A prepared run, its module wrapped. Leaves the process group up, so that another run can follow."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        runtime = Runtime.start(recipe)
        task = build_task(recipe, runtime)
        task.module = wrap(task.module)
        prepare(runtime, task)
        yield runtime, task
        runtime.engine.destroy()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Poison(nn.Module):
    """Makes the loss, or only its gradient, not finite in micro-batches that say so in `poison`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def source_sums(self) -> Tensor | None:
        return self.module.source_sums  # type: ignore[return-value]

    def forward(self, poison: str, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss, right = self.module(**inputs)
        if poison == "loss":
            loss = loss * math.nan
        elif poison == "gradient":
            loss = loss.clone()
            loss.register_hook(lambda gradient: gradient * math.inf)
            loss = loss.clone()
        return loss, right


def poisoned(batch: StepBatch, poison: dict[int, str]) -> StepBatch:
    """The batch for a `Poison`: {index of a micro-batch: "loss" or "gradient"}."""
    micro_batches = [
        each.with_inputs(poison=poison.get(index, ""))  # type: ignore[arg-type]
        for index, each in enumerate(batch.micro_batches)
    ]
    return replace(batch, micro_batches=micro_batches)


def train_batch(runtime: Runtime, batch: StepBatch, learning_rate: float) -> tuple[float, bool]:
    """One global step as the loop makes it. Returns the mean loss over its targets and whether it was applied."""
    targets = int(runtime.all_reduce_sum([batch.targets])[0])
    losses = 0.0
    for micro_batch in batch.micro_batches:
        loss, _ = micro_batch.run(runtime.engine)
        runtime.backward(loss, targets, is_last=micro_batch is batch.micro_batches[-1])
        losses += float(loss.detach())
    applied = runtime.apply_step(learning_rate)
    return float(runtime.all_reduce_sum_float([losses])[0]) / targets, applied


def train_steps(runtime: Runtime, task: Task, steps: int, learning_rate: float = 1e-3) -> list[float]:
    """Losses of the first `steps` global steps."""
    losses = []
    with task.steps(0) as batches:
        for batch in islice(batches, steps):
            (completed,) = task.completed([batch])
            losses.append(train_batch(runtime, completed, learning_rate)[0])
    return losses


def state_pieces(runtime: Runtime, task: Task, state: str) -> Pieces:
    """What this rank owns of a state ("weight", "exp_avg", …) of the optimizer."""
    pieces: Pieces = {}
    for fragment in resident_fragments(runtime, task.model):
        if state in fragment.states:
            start, stop = fragment.owned
            view = fragment.states[state][start - fragment.offset : stop - fragment.offset]
            pieces[fragment.parameter, start] = view.detach().cpu().float().numpy().copy()
    return pieces


def whole(pieces_of_ranks: list[Pieces]) -> dict[str, NDArray[np.float32]]:
    """Flat parameters, put together from what all ranks own."""
    merged: dict[str, dict[int, NDArray[np.float32]]] = {}
    for pieces in pieces_of_ranks:
        for (name, start), values in pieces.items():
            merged.setdefault(name, {})[start] = values
    return {name: np.concatenate([parts[start] for start in sorted(parts)]) for name, parts in merged.items()}


def relative_difference(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> float:
    """Norm of the difference ÷ norm of the second, over all parameters."""
    assert first.keys() == second.keys()
    apart = sum(float(np.square(first[name].astype(np.float64) - second[name]).sum()) for name in first)
    return float(np.sqrt(apart / sum(float(np.square(v.astype(np.float64)).sum()) for v in second.values())))


def model_weights(runtime: Runtime, task: Task) -> dict[str, NDArray[np.float32]]:
    """The whole weights that the forward pass uses, by name. A collective call."""
    import deepspeed

    parameters = dict(task.model.named_parameters())
    partitioned = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: parameter.detach().float().numpy().copy() for name, parameter in parameters.items()}


RecipeMaker = Callable[..., Recipe]


def training_rows(recipe: Recipe) -> StreamSpec:
    """What the rows of a recipe's run depend on."""
    assert isinstance(recipe, MaskedLmRecipe)
    timeline = make_timeline(recipe, corpus_tokens(recipe))
    assert timeline is not None
    return training_stream(recipe, timeline)


def dense_labels(rows: StepRows) -> NDArray[np.int32]:
    """The labels of masked tokens where they stand, (rows, tokens), -100 elsewhere: as Transformers takes them."""
    labels = np.full_like(rows.input_ids, -100)
    row, slot = np.nonzero(rows.labels >= 0)
    labels[row, rows.masked_positions[row, slot]] = rows.labels[row, slot]
    return labels
