"""What a task supplies to the one training loop: a model, the rows of each step, and how to score."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstrain.data.counter_rng import stream_key
from dstrain.errors import RecipeError
from dstrain.model.shape import AnyShape
from dstrain.plan import step_flops, total_steps
from dstrain.recipe.schema import Recipe
from dstrain.train.runtime import Runtime

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one global step.

    `targets` counts what the loss sums over on this rank, `pairs` what a second loss beside it does; `digest` is two
    int64 whose sums over ranks, modulo 2**64, identify the global batch; `cursors` (lanes of this rank, 3) say where
    each lane stands after this step.
    """

    data_step: int
    row_numbers: NDArray[np.int64]  # (rows of this rank,), in the order of the micro-batches
    micro_batches: Sequence[Inputs]
    targets: int
    digest: NDArray[np.int64]  # (2,)
    cursors: NDArray[np.int64]
    pairs: int = 0
    bad_samples: int = 0
    bad_sample_reports: tuple[str, ...] = ()
    seconds_waited: float = 0.0


def seeded_micro_batches(batch: StepBatch, seed: int) -> Iterator[Inputs]:
    """The micro-batches in turn, each after the seeding that its dropout begins with.

    Dropout is a function of the rows, not of a generator's history: there is no state to save or to skew.
    """
    rows_done = 0
    for inputs in batch.micro_batches:
        torch.manual_seed(int(stream_key(seed, "dropout", int(batch.row_numbers[rows_done]))) >> 1)
        rows_done += len(next(iter(inputs.values())))
        yield inputs


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
    """Size of a run: its steps, and for one global step the tokens and the floating-point operations of training."""

    steps: int
    tokens_per_step: int
    flops_per_step: float

    @classmethod
    def of(cls, recipe: Recipe, shape: AnyShape, corpus_tokens: int | None) -> Self:
        """From the recipe's arithmetic. Raises RecipeError where the length is in epochs of an unknown size."""
        steps = total_steps(recipe, corpus_tokens)
        if steps is None:
            raise RecipeError(
                f"train.epochs={recipe.train.epochs}, but nobody counted the corpus's tokens; give train.steps or "
                f"train.tokens, or make token shards with `dstrain shards build --tokenizer`"
            )
        tokens = recipe.train.global_batch_rows * recipe.data.row_tokens
        return cls(steps, tokens, step_flops(recipe, shape).model * tokens)


def task_class(recipe: Recipe) -> type["Task"]:
    """The class of a recipe's objective: `masked_lm` is `MaskedLm` of `dstrain.tasks.masked_lm`."""
    name = "".join(map(str.capitalize, recipe.objective.split("_")))
    found: type[Task] = getattr(importlib.import_module(f"dstrain.tasks.{recipe.objective}"), name)
    return found


class Task(ABC):
    """A training objective, built alike on every rank. The loop owns optimizer, checkpoints, logging and stopping."""

    auto_model: ClassVar[Any]  # the class of Transformers that loads what is exported
    model: PreTrainedModel  # fp32 as Transformers builds it: the names and shapes of what is saved
    runtime: Runtime
    module: nn.Module  # wraps `model`; called on a micro-batch it returns (sum of losses, number right)
    totals: TaskTotals
    lanes: int  # rows this far apart share a cursor
    max_bad_samples: int
    has_valid: bool = True  # whether there is held-out data
    counts_right: bool = True  # whether a prediction is right or wrong
    notes: Sequence[str] = ()  # what people should know about the data, for the log

    @abstractmethod
    def __init__(self, recipe: Any, runtime: Runtime) -> None: ...

    def steps(self, data_step: int, cursors: NDArray[np.int64] | None) -> AbstractContextManager[Iterator[StepBatch]]:
        """This rank's step batches from `data_step` on: `rank_steps` of the runtime's rank."""
        return self.rank_steps(self.runtime.rank, self.runtime.world_size, data_step, cursors)

    @abstractmethod
    def rank_steps(
        self, rank: int, world_size: int, data_step: int, cursors: NDArray[np.int64] | None
    ) -> AbstractContextManager[Iterator[StepBatch]]:
        """An endless stream of the step batches of any rank of any world, from `data_step` on.

        Args:
            rank: whose batches.
            world_size: of how many ranks.
            data_step: the first one; data step t consists of the rows t × global_batch_rows and following.
            cursors: (lanes, 3) as saved, or None at the beginning of a run.
        """

    def completed(self, batches: Sequence[StepBatch]) -> Sequence[StepBatch]:
        """The batches with what their micro-batches need of the whole global batch: nothing, for most losses.

        A collective call, before the forward passes of a step.

        Args:
            batches: this rank's share of a global step; or the shares of all ranks, where one process replays them.
        """
        return batches

    @abstractmethod
    def documents(
        self, rank: int, world_size: int, data_step: int, cursors: NDArray[np.int64] | None
    ) -> list[RowDocument]:
        """The documents in a rank's rows of one data step, by row and place in it.

        Args:
            rank: whose rows.
            world_size: of how many ranks.
            data_step: which step.
            cursors: (lanes, 3), where the lanes stood before it; None at the beginning of a run.
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
