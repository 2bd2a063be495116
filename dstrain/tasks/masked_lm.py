"""Masked-language-model pretraining: packed rows in lane order, sparse prediction, evaluation with frozen masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from dstrain.architectures.shape import model_shape
from dstrain.checkpoint.identity import stream_identity
from dstrain.data.layout import Layout
from dstrain.data.row_documents import RowDocuments
from dstrain.data.rows import StepRows
from dstrain.data.shards import Corpus
from dstrain.data.spec import StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import RecipeError
from dstrain.model.encoder import build_model, encode_packed, predict_tokens
from dstrain.model.lora import base_identity
from dstrain.model.rope import RotaryKeys
from dstrain.model.sparse import IGNORED, SparseMaskedLm
from dstrain.plan import BatchPlan, batch_plan, step_flops
from dstrain.plan.streams import training_stream, validation_stream
from dstrain.plan.timeline import PhasePlan, Timeline, make_timeline
from dstrain.recipe.schema import MaskedLmRecipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import MicroBatch, RowDocument, StepBatch, Task, TaskTotals, perplexity

LABELS = ("labels", "pair_labels")  # what `IGNORED` makes a row of that counts for nothing


class MaskedLm(Task):
    """The `masked_lm` task on one rank."""

    auto_model = AutoModelForMaskedLM
    wrapper: ClassVar[type[SparseMaskedLm]] = SparseMaskedLm
    module: SparseMaskedLm

    def __init__(self, recipe: MaskedLmRecipe, runtime: Runtime) -> None:
        self._recipe, self.runtime = recipe, runtime
        tokenizer = load_document_tokenizer(recipe.tokenizer)
        self.model = build_model(recipe.model, recipe.train.seed, tokenizer.special_token_ids, auto=self.auto_model)
        if self.model.config.vocab_size < tokenizer.vocab_size:
            raise RecipeError(
                f"the model's vocab_size={self.model.config.vocab_size} is smaller than the tokenizer's "
                f"{tokenizer.vocab_size} ({recipe.tokenizer}); raise model.config.vocab_size"
            )
        self._rotary_keys = RotaryKeys.of(self.model)
        self.lanes = recipe.lanes
        sources = recipe.data.training_sources
        if len(sources) > 1:
            self.sources = tuple(sources)
        self.module = self.wrapper(self.model, len(sources))
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
        return Layout(training_stream(self._recipe, self.totals.timeline, origin))

    def spec(self) -> StreamSpec:
        """What the rows of training depend on."""
        return training_stream(self._recipe, self.totals.timeline, self.origin)

    @contextmanager
    def rank_steps(self, rank: int, world_size: int, data_step: int) -> Iterator[Iterator[StepBatch]]:
        """See `Task`."""
        prefetch_steps = self._recipe.data.prefetch_steps
        with RowStream(self.spec(), rank, world_size, first_step=data_step, prefetch_steps=prefetch_steps) as stream:
            plans = [batch_plan(self._recipe, world_size, phase) for phase in self.totals.timeline.phases]
            yield (self._batch(rows, plans[self.phase_at(rows.step).number], stream.seconds_waited) for rows in stream)

    def documents(self, rank: int, world_size: int, data_step: int) -> list[RowDocument]:
        """See `Task`. Text and place are those before masking, and before pairs were made."""
        decode = load_document_tokenizer(self._recipe.tokenizer).decode
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
        sums = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        with RowStream(valid.spec, runtime.rank, runtime.world_size) as stream:
            for rows in islice(stream, valid.batches):
                for micro_batch in self._batch(rows, runtime.batch, 0.0).micro_batches:
                    sums = sums + self.sums(module, micro_batch)
        return runtime.all_reduce_sum_float(sums.cpu().numpy())

    def sums(self, module: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """What `metrics` needs of a micro-batch, added up over all of them: loss, right and targets, fp64 (3,)."""
        loss, right = micro_batch.run(module)
        return torch.stack([loss.double(), right.double(), (micro_batch.inputs["labels"] >= 0).sum().double()])

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        """The metrics of an evaluation from its `sums`."""
        loss, right, targets = sums
        mean = float(loss / targets)
        return {"loss": mean, "perplexity": perplexity(mean), "accuracy": float(right / targets)}

    # ------------------------------------------------------------ export

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one packed row; each gives (tokens, vocab_size)."""
        row = torch.cat(list(documents))[None]
        position_ids = torch.cat([torch.arange(len(document)) for document in documents])[None]
        logits = predict_tokens(model, encode_packed(model, row, position_ids)[0])
        return list(torch.split(logits, [len(document) for document in documents]))

    @staticmethod
    def save_extras(recipe: MaskedLmRecipe, folder: Path) -> None:
        """The tokenizer, so that the exported folder is whole."""
        AutoTokenizer.from_pretrained(recipe.tokenizer, local_files_only=True).save_pretrained(folder)

    def arrays(self, rows: StepRows) -> dict[str, NDArray[np.integer]]:
        """What the module is given of a step's rows, by name; the rows are the first axis of each."""
        return {
            "input_ids": rows.input_ids,
            "position_ids": rows.position_ids,
            "masked_positions": rows.masked_positions,
            "labels": rows.labels,
        }

    def _batch(self, rows: StepRows, plan: BatchPlan, seconds_waited: float) -> StepBatch:
        """Copy a step out of the stream's buffer, which the next step will overwrite, and cut it in micro-batches."""
        arrays: dict[str, NDArray[np.integer]] = self.arrays(rows)
        source_rows = None
        if self.sources:
            arrays["sources"] = rows.sources
            source_rows = np.bincount(rows.sources, minlength=len(self.sources))
        return StepBatch(
            data_step=rows.step,
            micro_batches=_micro_batches(arrays, rows.row_numbers.copy(), plan, self.runtime.device),
            targets=int((rows.labels >= 0).sum()),
            digest=rows.digest.copy(),
            pairs=int((rows.pairs[:, :, 3] >= 0).sum()),
            source_rows=source_rows,
            seconds_waited=seconds_waited,
        )


def _open(recipe: MaskedLmRecipe, location: str, tokenizer: DocumentTokenizer) -> Corpus:
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


def _totals(recipe: MaskedLmRecipe, timeline: Timeline) -> TaskTotals:
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


def _valid_sets(recipe: MaskedLmRecipe, tokenizer: DocumentTokenizer) -> dict[str | None, _ValidSet]:
    """`data.valid` (None), and what sources have of their own by their names."""
    locations: dict[str | None, str | None] = {None: recipe.data.valid}
    locations.update((name, source.valid) for name, source in recipe.data.training_sources.items())
    sets: dict[str | None, _ValidSet] = {}
    for name, location in locations.items():
        if location is not None:
            tokens = _open(recipe, location, tokenizer).total_tokens
            sets[name] = _ValidSet(validation_stream(recipe, location, recipe.lanes), _valid_batches(recipe, tokens))
    return sets


def _valid_batches(recipe: MaskedLmRecipe, tokens: int) -> int:
    """How many global batches an evaluation takes: as asked, or as many as the held-out tokens fill."""
    if recipe.evaluate.batches is not None:
        return recipe.evaluate.batches
    return max(1, tokens // (recipe.train.global_batch_rows * recipe.data.sequence_length))


def _micro_batches(
    arrays: dict[str, NDArray[np.integer]], row_numbers: NDArray[np.int64], plan: BatchPlan, device: torch.device
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
            whole = torch.cat([whole, torch.full_like(filling, IGNORED) if name in LABELS else filling])
        pieces[name] = torch.split(whole, size)
    return [
        MicroBatch(
            dict(zip(pieces, (parts[number] for parts in pieces.values()), strict=True)),
            row_numbers[number * size : (number + 1) * size],
        )
        for number in range(plan.accumulation)
    ]
