"""Pretraining on packed rows in lane order, with evaluation under frozen masks, whatever is learnt from the rows.

An objective says which model, or models, it trains, what a row has to bring, and of which terms its loss consists.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer

from dstrain.architectures import model_shape
from dstrain.checkpoint.identity import stream_identity
from dstrain.data.layout import Layout
from dstrain.data.row_documents import RowDocuments
from dstrain.data.rows import StepRows
from dstrain.data.shards import Corpus
from dstrain.data.spec import StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import RecipeError
from dstrain.model.lora import base_identity
from dstrain.model.rope import RotaryKeys
from dstrain.model.sparse import IGNORED, Objective
from dstrain.plan import BatchPlan, batch_plan, step_flops
from dstrain.plan.streams import training_stream, validation_stream
from dstrain.plan.timeline import PhasePlan, Timeline, make_timeline
from dstrain.recipe.schema import PretrainingRecipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import MicroBatch, RowDocument, StepBatch, Task, TaskTotals, perplexity


class Pretraining(Task):
    """A task on packed rows of shards, on one rank; a subclass for each objective."""

    module: Objective

    @abstractmethod
    def build(self, tokenizer: DocumentTokenizer, source_count: int) -> Objective:
        """The model, or the models, of `self.recipe` with initial weights by its seed.

        Args:
            tokenizer: that of the recipe.
            source_count: of how many sources the rows are.
        """

    def arrays(self, rows: StepRows) -> dict[str, NDArray[np.integer]]:
        """What the module is given of a step's rows, by name; the rows are the first axis of each.

        Where a rank has too few rows, copies of its first row fill the micro-batches. Of them, the labels of all terms
        are `IGNORED`.
        """
        return {
            "input_ids": rows.input_ids,
            "position_ids": rows.position_ids,
            "masked_positions": rows.masked_positions,
            "labels": rows.labels,
        }

    def __init__(self, recipe: PretrainingRecipe, runtime: Runtime) -> None:
        self.recipe, self.runtime = recipe, runtime
        tokenizer = load_document_tokenizer(recipe.tokenizer)
        sources = recipe.data.training_sources
        self.module = self.build(tokenizer, len(sources))
        self.model = self.module.model
        if self.model.config.vocab_size < tokenizer.vocab_size:
            raise RecipeError(
                f"the model's vocab_size={self.model.config.vocab_size} is smaller than the tokenizer's "
                f"{tokenizer.vocab_size} ({recipe.tokenizer}); raise model.config.vocab_size"
            )
        self._rotary_keys = RotaryKeys.of(self.model)
        self.lanes = recipe.lanes
        if len(sources) > 1:
            self.sources = tuple(sources)
        self._corpora = {name: _open(recipe, source.shards, tokenizer) for name, source in sources.items()}
        timeline = make_timeline(recipe, {name: corpus.total_tokens for name, corpus in self._corpora.items()})
        assert timeline is not None, "the tokens are counted"
        self.totals = _totals(recipe, timeline)
        self.notes = [*timeline.notes, *(note for corpus in self._corpora.values() for note in _bad_samples(corpus))]
        self._identity = stream_identity(recipe, timeline, self._corpora, tokenizer.digest) | base_identity(self.model)
        self._valid = _valid_sets(recipe, tokenizer)
        self.has_valid = bool(self._valid)
        self.enter_phase(self.phase_at(0))

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return self._identity

    def enter_phase(self, phase: PhasePlan) -> None:
        """See `Task`: rotary positions are those of the phase."""
        self._rotary_keys.set_on(self.model, phase.rope)

    @cache  # noqa: B019  (there is one task in a process, and it stays)
    def _layout(self, origin: tuple[int, int]) -> Layout:
        """Of the rows since `origin`."""
        return Layout(training_stream(self.recipe, self.totals.timeline, origin))

    def spec(self) -> StreamSpec:
        """What the rows of training depend on."""
        return training_stream(self.recipe, self.totals.timeline, self.origin)

    @contextmanager
    def rank_steps(self, rank: int, world_size: int, data_step: int) -> Iterator[Iterator[StepBatch]]:
        """See `Task`."""
        prefetch_steps = self.recipe.data.prefetch_steps
        with RowStream(self.spec(), rank, world_size, first_step=data_step, prefetch_steps=prefetch_steps) as stream:
            plans = [batch_plan(self.recipe, world_size, phase) for phase in self.totals.timeline.phases]
            yield (self._batch(rows, plans[self.phase_at(rows.step).number], stream.seconds_waited) for rows in stream)

    def documents(self, rank: int, world_size: int, data_step: int) -> list[RowDocument]:
        """See `Task`. Text and place are those before masking, and before pairs were made."""
        decode = load_document_tokenizer(self.recipe.tokenizer).decode
        return [
            RowDocument(
                part.row, part.first_token, len(part.ids), part.shard, part.key, part.document, decode(part.ids)
            )
            for part in RowDocuments(self.spec()).of_step(rank, world_size, data_step)
        ]

    def source_sums(self) -> Tensor | None:
        """See `Task`."""
        return self.module.source_sums

    def source_tokens(self, data_step: int) -> dict[str, tuple[int, float]]:
        """See `Task`."""
        if not self.sources:
            return {}
        tokens = self._layout(self.origin).source_tokens(data_step)
        corpora = self._corpora.items()
        return {name: (read, read / c.total_tokens) for (name, c), read in zip(corpora, tokens.tolist(), strict=True)}

    # ------------------------------------------------------------ evaluation

    def evaluate(self, runtime: Runtime, module: nn.Module) -> dict[str, float]:
        """Loss, perplexity and accuracy on `evaluate.batches` global batches of `data.valid`; also of each source's.

        Without a `data.valid`, those of all sources together. The streams start anew each time, so the same rows have
        the same masks in every evaluation of every run. Rows are those of the recipe in every phase, not of the phase.
        """
        sums = {name: self._valid_sums(runtime, module, valid) for name, valid in self._valid.items()}
        metrics = self.metrics(sums[None] if None in sums else np.sum(list(sums.values()), axis=0))
        for name in self._valid:
            if name is not None:
                metrics |= {f"{metric}.{name}": value for metric, value in self.metrics(sums[name]).items()}
        return metrics

    def _valid_sums(self, runtime: Runtime, module: nn.Module, valid: "_ValidSet") -> NDArray[np.float64]:
        sums = torch.zeros(len(self.terms), 3, dtype=torch.float64, device=runtime.device)
        with RowStream(valid.spec, runtime.rank, runtime.world_size) as stream:
            for rows in islice(stream, valid.batches):
                for micro_batch in self._batch(rows, runtime.batch, 0.0).micro_batches:
                    sums = sums + self.sums(module, micro_batch)
        return runtime.all_reduce_sum_float(sums.cpu().numpy())

    def sums(self, module: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """What `metrics` needs of a micro-batch, to be added up over all: loss, right and targets, fp64 (terms, 3)."""
        losses, right = (tensor.double().view(-1) for tensor in micro_batch.sums(module))
        targets = [(micro_batch.inputs[term.labels] >= 0).sum(dtype=torch.float64) for term in self.terms]
        return torch.stack([losses, right, torch.stack(targets)], dim=-1)

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        """The metrics of an evaluation from its `sums`: of the first term without, of others with its name."""
        metrics: dict[str, float] = {}
        for number, (term, (loss, right, targets)) in enumerate(zip(self.terms, sums.tolist(), strict=True)):
            mean, accuracy = loss / max(targets, 1.0), right / max(targets, 1.0)
            if number == 0:
                metrics |= {"loss": mean, "perplexity": perplexity(mean), "accuracy": accuracy}
            else:
                metrics |= {f"{term.name}_loss": mean, f"{term.name}_accuracy": accuracy}
        return metrics

    # ------------------------------------------------------------ export

    @staticmethod
    def save_extras(recipe: PretrainingRecipe, folder: Path) -> None:
        """The tokenizer, so that the exported folder is whole."""
        AutoTokenizer.from_pretrained(recipe.tokenizer, local_files_only=True).save_pretrained(folder)

    def _batch(self, rows: StepRows, plan: BatchPlan, seconds_waited: float) -> StepBatch:
        """Copy a step out of the stream's buffer, which the next step will overwrite, and cut it in micro-batches."""
        arrays, labels = self.arrays(rows), [term.labels for term in self.terms]
        source_rows = None
        if self.sources:
            arrays["sources"] = rows.sources
            source_rows = np.bincount(rows.sources, minlength=len(self.sources))
        return StepBatch(
            data_step=rows.step,
            micro_batches=_micro_batches(arrays, labels, rows.row_numbers.copy(), plan, self.runtime.device),
            counts=tuple(int((arrays[name] >= 0).sum()) for name in labels),
            digest=rows.digest.copy(),
            source_rows=source_rows,
            seconds_waited=seconds_waited,
        )


def _open(recipe: PretrainingRecipe, location: str, tokenizer: DocumentTokenizer) -> Corpus:
    data = recipe.data
    return Corpus.open(
        location,
        text_field=data.text_field,
        tokenizer=tokenizer,
        on_bad_sample=data.on_bad_sample,
        max_bad_samples=data.max_bad_samples,
    )


def _bad_samples(corpus: Corpus) -> Iterator[str]:
    """What the log says of samples that could not be read."""
    if corpus.bad_sample_count:
        yield f"{corpus.bad_sample_count:,} samples cannot be read and are left out (data.on_bad_sample=skip):"
        yield from corpus.bad_samples


def _totals(recipe: PretrainingRecipe, timeline: Timeline) -> TaskTotals:
    shape = model_shape(recipe.model)
    return TaskTotals(
        timeline,
        tuple(float(phase.sequence_length) for phase in timeline.phases),
        tuple(step_flops(recipe, shape, phase).model for phase in timeline.phases),
    )


@dataclass(frozen=True)
class _ValidSet:
    """What an evaluation reads: so many global batches of a stream."""

    spec: StreamSpec
    batches: int


def _valid_sets(recipe: PretrainingRecipe, tokenizer: DocumentTokenizer) -> dict[str | None, _ValidSet]:
    """`data.valid` (None), and what sources have of their own by their names."""
    locations: dict[str | None, str | None] = {None: recipe.data.valid}
    locations.update((name, source.valid) for name, source in recipe.data.training_sources.items())
    sets: dict[str | None, _ValidSet] = {}
    for name, location in locations.items():
        if location is not None:
            tokens = _open(recipe, location, tokenizer).total_tokens
            sets[name] = _ValidSet(validation_stream(recipe, location, recipe.lanes), _valid_batches(recipe, tokens))
    return sets


def _valid_batches(recipe: PretrainingRecipe, tokens: int) -> int:
    """How many global batches an evaluation takes: as asked, or as many as the held-out tokens fill."""
    if recipe.evaluate.batches is not None:
        return recipe.evaluate.batches
    return max(1, tokens // (recipe.train.global_batch_rows * recipe.data.sequence_length))


def _micro_batches(
    arrays: dict[str, NDArray[np.integer]],
    labels: Collection[str],
    row_numbers: NDArray[np.int64],
    plan: BatchPlan,
    device: torch.device,
) -> list[MicroBatch]:
    """Cut a rank's rows into micro-batches of one shape; where there are too few, copies of the first row fill them.

    The copies are of real tokens, so that they are as finite, and have no labels.
    """
    rows, size = len(row_numbers), plan.micro_batch_rows
    missing = plan.accumulation * size - rows
    assert missing >= 0, f"{rows} rows do not fit {plan.accumulation} micro-batches of {size}"
    pieces: dict[str, tuple[Tensor, ...]] = {}
    for name, array in arrays.items():
        whole = torch.from_numpy(array.astype(np.int64)).to(device)
        if missing:
            filling = whole[:1].expand(missing, *whole.shape[1:])
            whole = torch.cat([whole, torch.full_like(filling, IGNORED) if name in labels else filling])
        pieces[name] = torch.split(whole, size)
    return [
        MicroBatch(
            dict(zip(pieces, (parts[number] for parts in pieces.values()), strict=True)),
            row_numbers[number * size : (number + 1) * size],
        )
        for number in range(plan.accumulation)
    ]
