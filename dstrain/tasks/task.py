"""What a task supplies to the one training loop: a model, the rows of each step, and how to score."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from dstrain.base.counter_rng import stream_key
from dstrain.model.encoder import build_again
from dstrain.plan.timeline import PhasePlan, Timeline
from dstrain.recipe.definition import definition_of
from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import Runtime

Inputs = dict[str, Tensor]
LARGEST_LOSS = 80.0  # of which a perplexity is told


@dataclass(frozen=True)
class LossTerm:
    """A part of a loss: the sum of its losses over the global batch, divided by its targets there, times `weight`.

    The loss of a step is the sum of its terms. The first one's targets are those that logs and replays count.
    """

    name: str
    labels: str = "labels"  # the module's input that holds its targets: entries below 0 are none
    weight: float = 1.0


def term_weights(terms: Sequence[LossTerm], counts: Sequence[int]) -> list[float]:
    """What a loss of each term counts, so that the weighted sum ÷ the first term's targets is the sum of all terms.

    Args:
        terms: of the loss.
        counts: targets of each in the global batch.
    """
    return [term.weight * (counts[0] / max(count, 1)) for term, count in zip(terms, counts, strict=True)]


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    `row_numbers` are those of its first rows. What comes after them has no targets: it gives all micro-batches of a
    step one shape. A micro-batch without row numbers is there so that every rank makes as many passes, which ZeRO's
    collectives need. `weights`, fp32 (terms,), are those of `term_weights`; None where the loss has one term.
    """

    inputs: Inputs
    row_numbers: NDArray[np.int64]
    weights: Tensor | None = None

    def run(self, module: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What to backpropagate, and the number of right predictions of the first term, both scalars."""
        sums, right = self.sums(module)
        loss = sums if self.weights is None else (sums * self.weights).sum()
        return loss, right.view(-1)[0]

    def sums(self, module: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What the module returns: of each term the sum of its losses and the number of right predictions.

        Both are 0, gradients too, where no row counts.
        """
        sums, right = module(**self.inputs)
        return (sums, right) if len(self.row_numbers) else (sums * 0, right * 0)

    def with_inputs(self, **inputs: Tensor) -> Self:
        """The same rows with more for the module, or something else."""
        return replace(self, inputs=self.inputs | inputs)


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one global step.

    Every rank has as many micro-batches. `counts` has the targets of each term of the loss on this rank; `digest` is
    two int64 whose sums over ranks, modulo 2**64, identify the global batch.
    `source_rows` counts the rows of each source (sources,), where there are several. Padding counts nowhere.
    """

    data_step: int
    micro_batches: Sequence[MicroBatch]
    counts: tuple[int, ...]
    digest: NDArray[np.int64]  # (2,)
    source_rows: NDArray[np.int64] | None = None
    seconds_waited: float = 0.0

    @property
    def targets(self) -> int:
        """Targets of the first term."""
        return self.counts[0]

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """(rows of this rank,), in the order of the micro-batches."""
        return np.concatenate([micro_batch.row_numbers for micro_batch in self.micro_batches])


def seeded_micro_batches(batch: StepBatch, seed: int) -> Iterator[MicroBatch]:
    """The micro-batches in turn, each after the seeding that its dropout begins with: by the number of its first row.

    Dropout is a function of the rows, not of a generator's history: there is no state to save or to skew. But of all
    the rows of a micro-batch: which rows share one depends on the number of ranks and on `train.micro_batch_rows`. So a
    run with dropout that goes on with another number of ranks drops other activations than it would have: as random,
    and not the same. On equal ranks it is the same to the bit.
    """
    for micro_batch in batch.micro_batches:
        if len(micro_batch.row_numbers):
            torch.manual_seed(int(stream_key(seed, "dropout", int(micro_batch.row_numbers[0]))) >> 1)
        yield micro_batch


@dataclass(frozen=True)
class RowDocument:
    """A document, or a piece of one, within a row: what people look at when a step went wrong."""

    row: int  # number of the row in the run
    first_token: int  # where in the row it starts
    tokens: int
    file: str
    sample: str  # its key in the shard, or its line in the file
    document: int | None  # its number within a sample that holds several
    text: str


@dataclass(frozen=True)
class TaskTotals:
    """Size of a run: its timeline, and what a row costs in each of its phases."""

    timeline: Timeline
    row_tokens: tuple[float, ...]  # by phase; of rows of different lengths, the mean
    token_flops: tuple[float, ...]  # by phase: floating-point operations of training, for each token

    @property
    def steps(self) -> int:
        """Global steps of the whole run."""
        return self.timeline.total_steps

    def tokens(self, data_step: int) -> int:
        """Tokens of the global batch of a data step."""
        phase = self.timeline.phase_at(data_step)
        return round(phase.global_batch_rows * self.row_tokens[phase.number])

    def flops(self, data_step: int) -> float:
        """Floating-point operations of training on the global batch of a data step."""
        return self.token_flops[self.timeline.phase_at(data_step).number] * self.tokens(data_step)

    def tokens_before(self, step: int) -> int:
        """Tokens of the first `step` global steps of the recipe."""
        return sum(self.tokens(first) * steps for first, steps in self._steps_before(step))

    def flops_before(self, step: int) -> float:
        """Floating-point operations of the first `step` global steps of the recipe."""
        return sum(self.flops(first) * steps for first, steps in self._steps_before(step))

    def _steps_before(self, step: int) -> Iterator[tuple[int, int]]:
        """Each phase that begins before a step: its first step, and how many of its steps come before the other."""
        last = self.timeline.phase_at(max(step - 1, 0))
        for phase in self.timeline.phases[: last.number]:
            yield phase.first_step, phase.steps
        yield last.first_step, step - last.first_step


def perplexity(loss: float) -> float:
    """Of a mean loss; where it would be beyond all numbers, a very large one."""
    return float(np.exp(min(loss, LARGEST_LOSS)))


def task_class(recipe: Recipe) -> type["Task"]:
    """What trains a recipe."""
    trained: type[Task] = definition_of(recipe.task).trained(recipe)
    return trained


class Task(ABC):
    """A training objective, built alike on every rank. The loop owns optimizer, checkpoints, logging and stopping."""

    auto_model: ClassVar[Any]  # the class of Transformers that loads what is exported
    exported_part: ClassVar[str] = ""  # what the names of its parameters begin with in `model`, where that holds more
    model: PreTrainedModel  # fp32 as Transformers builds it: the names and shapes of what is saved
    runtime: Runtime
    module: nn.Module  # wraps `model`; called on a micro-batch it returns (sums of losses, numbers right): (terms,), or
    # scalars where there is one term
    terms: tuple[LossTerm, ...] = (LossTerm("loss"),)
    totals: TaskTotals
    lanes: int  # row r since the origin is of lane r mod lanes
    origin: tuple[int, int] = (0, 0)  # data step and row at which today's data began: after `--allow data-change`
    sources: tuple[str, ...] = ()  # of a mixture; where there is one source, none
    has_valid: bool = True  # whether there is held-out data
    counts_right: bool = True  # whether a prediction is right or wrong
    notes: Sequence[str] = ()  # what people should know about the data, for the log

    @abstractmethod
    def __init__(self, recipe: Any, runtime: Runtime) -> None: ...

    def steps(self, data_step: int) -> AbstractContextManager[Iterator[StepBatch]]:
        """This rank's step batches from `data_step` on: `rank_steps` of the runtime's rank."""
        return self.rank_steps(self.runtime.rank, self.runtime.world_size, data_step)

    @abstractmethod
    def rank_steps(self, rank: int, world_size: int, data_step: int) -> AbstractContextManager[Iterator[StepBatch]]:
        """An endless stream of the step batches of any rank of any world, from `data_step` on.

        Args:
            rank: whose batches.
            world_size: of how many ranks.
            data_step: the first one; data step t consists of the rows from `first_row(t)` on.
        """

    def first_row(self, data_step: int) -> int:
        """Number of the first row of a data step; those of a step follow each other."""
        began_at, row = self.origin
        timeline = self.totals.timeline
        return row + timeline.rows_before(data_step) - timeline.rows_before(began_at)

    def phase_at(self, data_step: int) -> PhasePlan:
        """The phase whose batch, rows and sources a data step has."""
        return self.totals.timeline.phase_at(data_step)

    def enter_phase(self, phase: PhasePlan) -> None:  # noqa: B027  (for most tasks it is always the same)
        """Make of the model what it is in a phase. Cheap, and the same however the run came there."""

    def completed(self, batches: Sequence[StepBatch]) -> Sequence[StepBatch]:
        """The batches with what their micro-batches need of the whole global batch: the weights of several terms.

        A collective call, before the forward passes of a step.

        Args:
            batches: this rank's share of a global step; or the shares of all ranks, where one process replays them.
        """
        if len(self.terms) == 1:
            return batches
        own = np.sum([batch.counts for batch in batches], axis=0)
        counts = self.runtime.all_reduce_sum(own).tolist()
        weights = torch.tensor(term_weights(self.terms, counts), dtype=torch.float32, device=self.runtime.device)
        return [
            replace(batch, micro_batches=[replace(each, weights=weights) for each in batch.micro_batches])
            for batch in batches
        ]

    def source_sums(self) -> Tensor | None:
        """Of the last forward pass: each source's losses, right predictions and targets, fp64 (sources, 3).

        None where there is one source.
        """
        return None

    def source_tokens(self, data_step: int) -> dict[str, tuple[int, float]]:
        """By source of a mixture, the tokens and the epochs of it in all rows before a data step."""
        return {}

    @abstractmethod
    def documents(self, rank: int, world_size: int, data_step: int) -> list[RowDocument]:
        """The documents in a rank's rows of one data step, by row and place in it.

        Args:
            rank: whose rows.
            world_size: of how many ranks.
            data_step: which step.
        """

    @abstractmethod
    def evaluate(self, runtime: Runtime, module: nn.Module) -> dict[str, Any]:
        """Metrics on the held-out data, equal on every rank and for every number of ranks. A collective call.

        Values are numbers, or JSON for reports (a confusion matrix, say).
        """

    def evaluate_test(self, runtime: Runtime, module: nn.Module) -> dict[str, Any]:
        """Metrics on the test split at the end of a run; none where there is no such split. A collective call."""
        return {}

    def predictions(self) -> dict[str, list[dict[str, Any]]]:
        """By split, what the last evaluation said of each example, for reports: JSON, none for tasks without examples.

        `line`, `text`, `true` and `predicted` are for people; `badness` says how wrong that is, 0 being right, and
        `confidence` is the probability of what was predicted. `calibration` has the bins of an example's predictions.
        `label` or `labels`, and `number`, are what `predicted` ought to be.

        What makes up a metric of all examples has its name: `scores` are averaged over the examples that have them;
        `sums` are added up, two of them to a ratio, those of `bleu` and `chrf` as sacrebleu does; the mean of
        `pseudo_values` is the metric, and their spread says how sure it is.
        """
        return {}

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resume (corpus digest, batch, masking, …), as JSON."""

    # ------------------------------------------------------------ export: needs a recipe and a model, no data

    @classmethod
    def rebuilt(cls, recipe: Any, seed: int, config: dict[str, Any]) -> PreTrainedModel:
        """The model of a run with adapters as it was before the first step.

        Args:
            recipe: of the run.
            seed: of the initial weights.
            config: of the model, as the checkpoint has it.
        """
        return build_again(recipe.model, seed, AutoConfig.for_model(**config), cls.auto_model)

    @staticmethod
    @abstractmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each document, computed on the path that training takes (packed, say), all in one batch.

        Args:
            model: in evaluation mode, fp32.
            documents: int64 token ids (tokens,), of different lengths, without the padding id.
        """

    @staticmethod
    def logits_of(outputs: Any) -> Tensor:
        """The logits (rows, …) of what an exported model returns, in the form of `training_logits`."""
        logits: Tensor = outputs.logits
        return logits

    @classmethod
    def logits_alone(cls, model: PreTrainedModel, document: Tensor) -> Tensor:
        """The logits of one document, int64 (tokens,), from an exported model, in the form of `training_logits`."""
        return cls.logits_of(model(input_ids=document[None]))[0]

    @staticmethod
    @abstractmethod
    def save_extras(recipe: Any, folder: Path) -> None:
        """Write beside an exported model what its user needs: the tokenizer, say. `recipe` is one of this task."""
