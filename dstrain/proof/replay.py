"""Replay: one step of a run computed again on one device, rank by rank, from the nearest checkpoint before it.

    checkpoint ≤ step - 1 ──► train on, on one device ──► weights of step - 1 ─┐
                                  every rank's rows ──► digest as in the ledger ├─► forward, backward: losses, gradients
                                                       micro-batches of rank K ─┘

Rows, masks and dropout are functions of (seed, row), so the micro-batches are exactly those of the run. Weights are
those of the checkpoint to the bit; each step trained on from there adds the rounding of another order of sums.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.checkpoint.identity import GlobalBatches
from dstrain.data.ledger import LedgerEntry
from dstrain.data.rows import digest_hex
from dstrain.errors import CheckpointError, UserError
from dstrain.plan import batch_plan
from dstrain.plan.schedule import learning_rate
from dstrain.proof.history import LoggedStep, StepHistory, logged_step, run_recipe, step_history
from dstrain.proof.trace import NonFinite, Trace
from dstrain.recipe.schema import Recipe
from dstrain.report.runs import read_metrics
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import RowDocument, StepBatch, Task, seeded_micro_batches
from dstrain.train.alone import alone
from dstrain.train.best import plateaued
from dstrain.train.state import restore_state

Say = Callable[[str], None]


@dataclass(frozen=True)
class RankLoss:
    """Mean loss of one rank's targets in a step, replayed and as logged (None: not logged)."""

    rank: int
    loss: float
    logged: float | None
    targets: int


@dataclass(frozen=True)
class LayerGradient:
    """Norm of a layer's gradient: of the global batch, and of the share of the rank that was asked for, if one was."""

    layer: str
    norm: float
    rank_norm: float | None


@dataclass(frozen=True)
class Replay:
    """What a replay found. Where a rank was asked for, `documents` are that rank's, else everybody's."""

    run: str
    step: int
    data_step: int
    rows: tuple[int, int]
    world_size: int
    rank: int | None
    device: str
    checkpoint: str | None  # None: the weights that the run began with
    steps_trained: int  # from there to the step before
    skipped_checkpoints: list[str]
    digest: str
    ledger_digest: str
    loss: float
    logged_loss: float | None
    gradient_norm: float
    logged_gradient_norm: float | None
    ranks: list[RankLoss]
    layers: list[LayerGradient]
    documents: list[RowDocument]
    traced: bool
    non_finite: NonFinite | None

    @property
    def same_rows(self) -> bool:
        """Whether these are the rows that the run trained on."""
        return self.digest == self.ledger_digest


def replay(
    run_dir: Path, step: int, rank: int | None, world_size: int | None, *, trace: bool, say: Say = lambda _: None
) -> Replay:
    """Compute a step of a run again, on the one device of this process.

    Args:
        run_dir: the run's folder.
        step: which global step, from 1.
        rank: whose documents and share of the gradient are wanted; None for everybody's.
        world_size: of how many ranks the step was; None: as the run logged it.
        trace: look for the first module with a value that is not finite.
        say: told what takes long.

    Raises:
        UserError: no run, no such step or rank, an impossible number of ranks, changed data, a foreign checkpoint.
    """
    recipe = run_recipe(run_dir)
    history = step_history(run_dir, step)
    logged = logged_step(run_dir, step)
    world_size = logged.world_size if world_size is None else world_size
    batch_plan(recipe, world_size)  # more ranks than lanes are refused here
    if rank is not None and not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: {world_size} ranks are numbered 0 to {world_size - 1}; give one of them")
    with alone(recipe) as (runtime, task):
        rehearsal = _Rehearsal(runtime, task, runtime.recipe, world_size)
        return _replayed(rehearsal, run_dir, history, logged, rank, trace, say)


class _Rehearsal:
    """All ranks of a world, one after the other on one device."""

    def __init__(self, runtime: Runtime, task: Task, recipe: Recipe, world_size: int) -> None:
        self.runtime, self.task, self.recipe, self.world_size = runtime, task, recipe, world_size
        self.plateau: dict[str, Any] | None = None  # see Manifest

    def in_turn(
        self, batches: Sequence[StepBatch], ranks: Iterable[int], trace: Trace | None = None
    ) -> Iterator[tuple[int, float]]:
        """Forward and backward of each rank's micro-batches: (rank, sum of its losses). Gradients add up."""
        targets, order = sum(batch.targets for batch in batches), list(ranks)
        batches = self.task.completed(batches)
        last = batches[order[-1]].micro_batches[-1]
        for rank in order:
            loss_sum = 0.0
            for micro_batch in seeded_micro_batches(batches[rank], self.recipe.train.seed):
                if trace is not None:
                    trace.rows = micro_batch.row_numbers.tolist()
                loss, _ = micro_batch.run(self.runtime.engine)
                self.runtime.backward(loss, targets, is_last=micro_batch is last)
                loss_sum += float(loss.detach())
            yield rank, loss_sum

    def train(self, batches: Sequence[StepBatch], step: int, logged_rate: float | None) -> None:
        """Make a global step, by the learning rate that was logged: the recipe may have another length by now."""
        for _ in self.in_turn(batches, range(self.world_size)):
            pass
        rate = learning_rate(self.recipe, self.task.totals.timeline, step - 1, self.plateau)
        self.runtime.apply_step(rate if logged_rate is None else logged_rate)

    def judge(self, evaluation: dict[str, Any] | None, step: int) -> None:
        """What the run's own evaluation after a step meant for the learning rate."""
        rule = self.recipe.schedule.plateau
        if rule is not None and evaluation is not None:
            metrics = {name.removeprefix("valid_"): value for name, value in evaluation.items()}
            self.plateau = plateaued(rule, self.plateau, step, metrics)

    def layer_norms(self) -> dict[str, float]:
        """Norm of the gradient so far, by layer."""
        squares: dict[str, float] = defaultdict(float)
        for name, parameter in self.task.model.named_parameters():
            if parameter.grad is not None:
                squares[layer_of(name)] += float(parameter.grad.double().square().sum())
        return {layer: math.sqrt(square) for layer, square in squares.items()}


def _replayed(
    rehearsal: _Rehearsal,
    run_dir: Path,
    history: StepHistory,
    logged: LoggedStep,
    rank: int | None,
    trace: bool,
    say: Say,
) -> Replay:
    world_size, entry, metrics = rehearsal.world_size, history.entries[-1], logged.metrics or {}
    data_step, batches = _at_the_step(rehearsal, run_dir, history, say)
    order = range(world_size) if rank is None else [rank, *(k for k in range(world_size) if k != rank)]
    tracer, sums, own_norms = Trace(), {}, {}
    with tracer.watching(rehearsal.task.module) if trace else nullcontext():
        for done, loss_sum in rehearsal.in_turn(batches, order, tracer):
            sums[done] = loss_sum
            if done == rank:
                own_norms = rehearsal.layer_norms()
    norms = rehearsal.layer_norms()
    rank_losses = metrics.get("rank_losses")
    if rank_losses is None or len(rank_losses) != world_size:  # not logged, or of another world than is asked for
        rank_losses = [None] * world_size
    targets = [batch.targets for batch in batches]
    shown = range(world_size) if rank is None else [rank]
    return Replay(
        run=str(run_dir),
        step=entry.step,
        data_step=data_step,
        rows=entry.rows,
        world_size=world_size,
        rank=rank,
        device=str(rehearsal.runtime.device),
        checkpoint=None if history.source is None else str(history.source.folder),
        steps_trained=len(history.entries) - 1,
        skipped_checkpoints=history.skipped,
        digest=digest_hex(np.sum([batch.digest for batch in batches], axis=0, dtype=np.int64)),
        ledger_digest=entry.digest,
        loss=sum(sums.values()) / max(sum(targets), 1),
        logged_loss=metrics.get("loss"),
        gradient_norm=math.sqrt(sum(norm**2 for norm in norms.values())),
        logged_gradient_norm=metrics.get("grad_norm"),
        ranks=[RankLoss(k, sums[k] / max(targets[k], 1), rank_losses[k], targets[k]) for k in range(world_size)],
        layers=[LayerGradient(layer, norm, own_norms.get(layer)) for layer, norm in norms.items()],
        documents=[document for k in shown for document in rehearsal.task.documents(k, world_size, data_step)],
        traced=trace,
        non_finite=tracer.found,
    )


def _at_the_step(rehearsal: _Rehearsal, run_dir: Path, history: StepHistory, say: Say) -> tuple[int, list[StepBatch]]:
    """Bring the weights to where the step began. Returns its data step, and all ranks' batches of it."""
    task, world_size = rehearsal.task, rehearsal.world_size
    _restore(rehearsal, history)
    steps = {_data_step(rehearsal, history, entry): entry.step for entry in history.entries}  # data step → step
    last = max(steps)
    file = run_dir / "metrics.jsonl"
    metrics = read_metrics(file) if file.is_file() else None
    evaluations = {entry["step"]: entry for entry in (metrics.evaluations if metrics else [])}
    rates = {entry["step"]: entry["learning_rate"] for entry in (metrics.training if metrics else [])}
    with ExitStack() as stack:
        streams = [stack.enter_context(task.rank_steps(k, world_size, min(steps))) for k in range(world_size)]
        for data_step in range(min(steps), last + 1):
            task.enter_phase(task.phase_at(data_step))
            batches = [next(stream) for stream in streams]
            if data_step in steps and data_step < last:  # a rollback drops the others
                say(f"step {steps[data_step]:,}: training it, to come to step {steps[last]:,}")
                rehearsal.train(batches, steps[data_step], rates.get(steps[data_step]))
                rehearsal.judge(evaluations.get(steps[data_step]), steps[data_step])
        return last, batches


def _restore(rehearsal: _Rehearsal, history: StepHistory) -> None:
    """Load the checkpoint, if there is one."""
    if history.source is not None:
        rehearsal.plateau = restore_state(rehearsal.runtime, rehearsal.task, history.source).plateau


def _data_step(rehearsal: _Rehearsal, history: StepHistory, entry: LedgerEntry) -> int:
    """Which global batch a step consumed, going by its first row."""
    task = rehearsal.task
    data_step = GlobalBatches(task.identity(), task.origin).step_of(entry.rows[0])
    done = 0 if history.source is None else history.source.manifest.data_step
    if data_step < done or task.first_row(data_step) != entry.rows[0]:
        where = (
            "the run's beginning" if history.source is None else f"{history.source.folder}, saved after {done} batches"
        )
        raise CheckpointError(
            f"the ledger has step {entry.step} with the rows {entry.rows[0]} to {entry.rows[1]}, which do not follow "
            f"{where}: the two are not of one run; restore the folder from a copy"
        )
    return data_step


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: up to its number, as `encoder.layer.3`, else its first two names."""
    parts = parameter.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: numbered + 1] if numbered is not None else parts[:-1][:2])
