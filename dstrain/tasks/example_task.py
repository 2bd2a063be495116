"""What tasks on labelled examples share: rows in a known order, batches of like length, and evaluation on any ranks.

    files ─► examples ─► rows (token ids and a target) ─► global batches ─► head ─► answers ─► scores

Row r of the run is row `order(epoch)[r % rows]` of epoch `r // rows`, and the order of an epoch is drawn from
(seed, epoch): a step's rows are a pure function of the files, the recipe and the step, and resuming needs no more.
Rank k of W has the rows k, k + W, … of a step, which need not be as many on every rank.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from dstrain.architectures import ARCHITECTURES
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.model.lora import base_identity
from dstrain.plan import batch_plan, step_flops
from dstrain.plan.timeline import make_timeline
from dstrain.recipe.schema import ExampleRecipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.batching import padded
from dstrain.tasks.epochs import epoch_order
from dstrain.tasks.splits import SplitReader, Splits
from dstrain.tasks.task import Inputs, MicroBatch, RowDocument, StepBatch, Task, TaskTotals

Answer = NDArray[np.float64]
LONGEST_SHOWN = 1000  # characters of a text in reports
SETTINGS = "dstrain.json"  # beside an exported model
E = TypeVar("E")


@dataclass(frozen=True)
class Row:
    """One row of a batch: a text, a pair of texts, or a window of a long one."""

    ids: NDArray[np.int32]  # (tokens,)
    target: NDArray[Any]  # what the head is trained towards
    example: int  # of its split
    answer_size: int  # how many numbers evaluation keeps of it
    targets: int = 1  # how many losses it adds
    second_start: int = 0  # where the second text begins; 0 where there is none

    @property
    def tokens(self) -> int:
        """How long it is, as batches of like length go by."""
        return len(self.ids)


class Head(nn.Module):
    """A Transformers model with a head that returns the *sum* of a micro-batch's losses and the number right.

    `outputs` holds what the last forward pass computed, detached, rows first; evaluation reads it.
    """

    outputs: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class ExampleTask(Task, Generic[E]):
    """A task on labelled examples, on one rank. `E` is the class of an example."""

    module: Head
    text_to_text: ClassVar[bool] = False  # whether the model writes text

    def __init__(self, recipe: ExampleRecipe, runtime: Runtime) -> None:
        self._recipe, self.runtime = recipe, runtime
        self.encoder: DocumentTokenizer = load_document_tokenizer(recipe.tokenizer, text_to_text=self.text_to_text)
        self.splits, reader = self.read()
        self.module = self.build()
        self.model = self.module.model
        self.rows = {name: self.make_rows(name, examples) for name, examples in self.splits.named().items()}
        self.notes, self.facts = [*reader.notes, *self.notes_on_rows()], reader.facts
        self._judged: dict[str, list[dict[str, Any]]] = {}  # by split, of the last evaluation
        train = self.rows["train"]
        timeline = make_timeline(recipe, len(train) * recipe.data.row_tokens)
        assert timeline is not None, "the number of rows is known"
        shape = ARCHITECTURES[recipe.model.architecture].shape(self.model.config.to_dict())
        # Rows of different lengths: count real tokens, not those of full rows.
        row_tokens = sum(row.tokens for row in train) / len(train)
        self.totals = TaskTotals(timeline, (row_tokens,), (step_flops(recipe, shape).model,))
        self.lanes = recipe.train.global_batch_rows
        self._lengths = [row.tokens for row in train]
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a step may begin in one epoch and end in the next
        self._token_types = shape.token_types > 1
        self._identity: dict[str, Any] = {
            "task": recipe.task,
            "corpus": _digest(train),
            "labels": list(self.model.config.id2label.values()),
            "tokenizer": self.encoder.digest,
            "data": recipe.data.model_dump(mode="json", include={"sequence_length", "length_groups", "seed"}),
            "global_batch_rows": recipe.train.global_batch_rows,
        } | base_identity(self.model)

    # ------------------------------------------------------------ what a task adds

    @abstractmethod
    def read(self) -> tuple[Splits[E], SplitReader]:
        """The examples, and the reader that they came through."""

    @abstractmethod
    def build(self) -> Head:
        """The head on its model, once the examples are read."""

    @abstractmethod
    def make_rows(self, split: str, examples: list[E]) -> list[Row]:
        """The rows of a split's examples; one example may give several. Evaluation may take others than training."""

    @abstractmethod
    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """What the head's `labels` are for these rows, padded to `width` tokens where a token has one each."""

    @abstractmethod
    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """What evaluation keeps of the last forward pass: `answer_size` numbers for each of its rows. All ranks call it
        alike, so it may run the model again."""

    @abstractmethod
    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """Metrics of a split from the answers to all of its rows: numbers, JSON under `report`, and for reports under
        `judged` what `Task.predictions` has of each example."""

    @abstractmethod
    def described(self, example: E) -> tuple[int, str, str]:
        """An example's line in data.train, its target in words, and its text."""

    def notes_on_rows(self) -> list[str]:
        """What people should know about the rows, for the log."""
        return []

    # ------------------------------------------------------------ training

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return self._identity

    @contextmanager
    def rank_steps(self, rank: int, world_size: int, data_step: int) -> Iterator[Iterator[StepBatch]]:
        """See `Task`."""
        yield (self._batch(rank, world_size, step) for step in count(data_step))

    def documents(self, rank: int, world_size: int, data_step: int) -> list[RowDocument]:
        """See `Task`."""
        row_numbers, chosen = self._chosen(rank, world_size, data_step)
        found = []
        for number, row in zip(row_numbers.tolist(), chosen, strict=True):
            line, target, text = self.described(self.splits.train[row.example])
            sample = f"line {line}, {target}"
            found.append(RowDocument(number, 0, len(row.ids), self._recipe.data.train, sample, None, text))
        return found

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """The head's arguments for some rows, on this rank's device."""
        starts = [row.second_start or len(row.ids) for row in rows] if self._token_types else []
        any_pair = any(row.second_start for row in rows)
        inputs = padded(
            [row.ids for row in rows],
            self.encoder.pad_id,
            self._recipe.data.sequence_length,
            starts if any_pair else [],
        )
        inputs["labels"] = self.labels_of(rows, inputs["input_ids"].shape[1])
        return {name: tensor.to(self.runtime.device) for name, tensor in inputs.items()}

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        data = self._recipe.data
        return epoch_order(data.seed, epoch, self._lengths, self._recipe.train.global_batch_rows, data.length_groups)

    def _chosen(self, rank: int, world_size: int, step: int) -> tuple[NDArray[np.int64], list[Row]]:
        """A rank's row numbers of a step, and which row of the training examples each of them is."""
        first, train = self.first_row(step), self.rows["train"]
        row_numbers = np.arange(first + rank, self.first_row(step + 1), world_size, dtype=np.int64)
        numbers = row_numbers - self.origin[1]  # of today's files
        return row_numbers, [train[int(self._order(r // len(train))[r % len(train)])] for r in numbers.tolist()]

    def _batch(self, rank: int, world_size: int, step: int) -> StepBatch:
        """A rank's rows of global step `step`, in as many micro-batches as every rank makes of its own."""
        row_numbers, chosen = self._chosen(rank, world_size, step)
        digest = np.zeros(2, np.int64)
        for row_number, row in zip(row_numbers.tolist(), chosen, strict=True):
            digest += _row_digest(row_number, row)
        accumulation = batch_plan(self._recipe, world_size).accumulation
        micro_batches = [
            MicroBatch(self.inputs([chosen[place] for place in places]), row_numbers[places])
            for places in np.array_split(np.arange(len(chosen)), min(accumulation, len(chosen)))
        ]
        missing = accumulation - len(micro_batches)
        return StepBatch(
            data_step=step,
            micro_batches=micro_batches + [MicroBatch(self.inputs(chosen[:1]), row_numbers[:0])] * missing,
            counts=(sum(row.targets for row in chosen),),
            digest=digest,
        )

    # ------------------------------------------------------------ evaluation

    def evaluate(self, runtime: Runtime, module: nn.Module) -> dict[str, Any]:
        """Loss and scores over the whole of the valid split, each row once."""
        return self._evaluated("valid", runtime, module)

    def evaluate_test(self, runtime: Runtime, module: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        return self._evaluated("test", runtime, module) if "test" in self.rows else {}

    def _evaluated(self, split: str, runtime: Runtime, module: nn.Module) -> dict[str, Any]:
        """Rank k takes every world_size-th micro-batch of the split ordered by length.

        So a row shares its batch with the same others on any number of ranks: what padding and rounding do to it is the
        same. All ranks make the same number of forward passes, which ZeRO-3 needs; where one has no rows left, it
        repeats one that does not count. The answers lie end to end in one vector, to which each rank adds its own.
        """
        rows = self.rows[split]
        by_length = np.argsort([-row.tokens for row in rows], kind="stable")
        micro = self._recipe.train.micro_batch_rows
        batches = [by_length[start : start + micro] for start in range(0, len(rows), micro)]
        mine = batches[runtime.rank :: runtime.world_size]
        passes = -(-len(batches) // runtime.world_size)
        places = np.concatenate([[0], np.cumsum([row.answer_size for row in rows])])
        answers = np.zeros(int(places[-1]))
        loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for number in range(passes):
            counts = number < len(mine)
            chosen = mine[number] if counts else by_length[:1]
            loss, _ = module(**self.inputs([rows[i] for i in chosen]))
            found = self.answers([rows[i] for i in chosen])
            if counts:
                loss_sum += loss.double()
                for index, answer in zip(chosen, found, strict=True):
                    answers[places[index] : places[index + 1]] = answer
        (loss_total,) = runtime.all_reduce_sum_float([loss_sum.item()])
        summed = runtime.all_reduce_sum_float(answers)
        scores = self.scores(split, np.split(summed, places[1:-1]))
        report = scores.pop("report")
        self._judged[split] = scores.pop("judged", [])
        return {
            "loss": float(loss_total) / max(sum(row.targets for row in rows), 1),
            **scores,
            "report": report | {"rows": len(self.splits.named()[split])} | self._facts_of(split),
        }

    def predictions(self) -> dict[str, list[dict[str, Any]]]:
        """See `Task`."""
        found = {}
        for split, judged in self._judged.items():
            described = map(self.described, self.splits.named()[split])
            found[split] = [
                {"line": line, "text": text[:LONGEST_SHOWN], "true": true} | each
                for (line, true, text), each in zip(described, judged, strict=bool(judged))
            ]
        return found

    def _facts_of(self, split: str) -> dict[str, Any]:
        """What the reader noted about a split, for its report."""
        facts = {
            "texts_also_in_train": self.facts.get(f"{split}_texts_also_in_train"),
            "texts_alike_in_train": self.facts.get(f"{split}_texts_alike_in_train"),
            "dropped": {
                f"data.{name}": self.facts[f"dropped_from_{name}"]
                for name in (["train", "valid"] if split == "valid" else [split])
                if f"dropped_from_{name}" in self.facts
            },
        }
        return {name: fact for name, fact in facts.items() if fact is not None}

    # ------------------------------------------------------------ export

    @staticmethod
    def save_extras(recipe: Any, folder: Path) -> None:
        """The tokenizer, cutting texts where training did, and what prediction needs of the recipe.

        The labels are in the model's own config.
        """
        settings = {
            "task": recipe.task,
            "data": recipe.data.model_dump(mode="json", exclude={"train", "valid", "test"}),
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer, local_files_only=True)
        tokenizer.model_max_length = recipe.data.sequence_length
        tokenizer.save_pretrained(folder)


def _row_digest(row_number: int, row: Row) -> NDArray[np.int64]:
    record = np.int64(row_number).tobytes() + row.target.tobytes() + row.ids.tobytes()
    return np.frombuffer(hashlib.blake2b(record, digest_size=16).digest(), np.int64)


def _digest(rows: list[Row]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for row in rows:
        total.update(np.int64(len(row.ids)).tobytes() + row.ids.tobytes() + row.target.tobytes())
    return total.hexdigest()
