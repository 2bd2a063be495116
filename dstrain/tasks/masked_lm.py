"""Masked-language-model pretraining: packed rows in lane order, sparse prediction, evaluation with frozen masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from dstrain.data.pieces import step_pieces
from dstrain.data.producer import StreamSpec
from dstrain.data.rows import StepRows
from dstrain.data.shards import Corpus
from dstrain.data.stream import RowStream
from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import RecipeError
from dstrain.model.encoder import build_model, encode_packed, predict_tokens
from dstrain.model.lora import base_identity
from dstrain.model.shape import model_shape
from dstrain.model.sparse import SparseMaskedLm
from dstrain.recipe.schema import MaskedLmRecipe
from dstrain.tasks.task import Inputs, RowDocument, StepBatch, Task, TaskTotals
from dstrain.train.runtime import Runtime


class MaskedLm(Task):
    """The `masked_lm` task on one rank."""

    auto_model = AutoModelForMaskedLM
    wrapper: ClassVar[type[nn.Module]] = SparseMaskedLm

    def __init__(self, recipe: MaskedLmRecipe, runtime: Runtime) -> None:
        self._recipe, self.runtime = recipe, runtime
        encoder = load_document_tokenizer(recipe.tokenizer)
        self.model = build_model(recipe.model, recipe.train.seed, encoder.special_token_ids, auto=self.auto_model)
        if self.model.config.vocab_size < encoder.vocab_size:
            raise RecipeError(
                f"the model's vocab_size={self.model.config.vocab_size} is smaller than the tokenizer's "
                f"{encoder.vocab_size} ({recipe.tokenizer}); raise model.config.vocab_size"
            )
        self.module = self.wrapper(self.model)
        self.lanes = recipe.data.lanes
        self.has_valid = recipe.data.valid is not None
        self.max_bad_samples = recipe.data.max_bad_samples
        corpus = Corpus.open(recipe.data.train, text_field=recipe.data.text_field, encode=encoder.encode)
        self._identity: dict[str, Any] = {
            "task": recipe.task,
            "corpus": corpus.digest,
            "tokenizer": encoder.digest,
            "data": recipe.data.model_dump(
                mode="json", include={"sequence_length", "lanes", "seed", "shuffle_window", "masking", "on_bad_sample"}
            ),
            "global_batch_rows": recipe.train.global_batch_rows,
        } | base_identity(self.model)
        self.totals = TaskTotals.of(recipe, model_shape(recipe.model), corpus.total_tokens)
        self._valid_batches = _valid_batches(recipe, self.totals.tokens_per_step)

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return self._identity

    @contextmanager
    def rank_steps(
        self, rank: int, world_size: int, data_step: int, cursors: NDArray[np.int64] | None
    ) -> Iterator[Iterator[StepBatch]]:
        """See `Task`."""
        spec = StreamSpec.from_recipe(self._recipe, "train")
        prefetch_steps = self._recipe.data.prefetch_steps
        with RowStream(
            spec, rank, world_size, first_step=data_step, cursors=cursors, prefetch_steps=prefetch_steps
        ) as stream:
            yield (self._batch(rows, stream.seconds_waited) for rows in stream)

    def documents(
        self, rank: int, world_size: int, data_step: int, cursors: NDArray[np.int64] | None
    ) -> list[RowDocument]:
        """See `Task`. Text and place are those before masking, and before pairs were made."""
        spec = StreamSpec.from_recipe(self._recipe, "train")
        decode = load_document_tokenizer(self._recipe.tokenizer).decode
        return [
            RowDocument(
                piece.row, piece.first_token, len(piece.ids), piece.shard, piece.key, piece.document, decode(piece.ids)
            )
            for piece in step_pieces(spec, rank, world_size, data_step, cursors)
        ]

    def evaluate(self, runtime: Runtime, module: nn.Module) -> dict[str, float]:
        """Loss, perplexity and accuracy on `evaluate.batches` global batches of `data.valid`.

        The stream starts anew each time, so the same rows have the same masks in every evaluation of every run.
        """
        sums = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        spec = StreamSpec.from_recipe(self._recipe, "valid")
        with RowStream(spec, runtime.rank, runtime.world_size) as stream:
            for rows in islice(stream, self._valid_batches):
                for inputs in self._batch(rows, 0.0).micro_batches:
                    sums = sums + self.sums(module, inputs)
        return self.metrics(runtime.all_reduce_sum_float(sums.cpu().numpy()))

    def sums(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """What `metrics` needs of a micro-batch, added up over all of them: loss, right and targets, fp64 (3,)."""
        loss, right = module(**inputs)
        return torch.stack([loss.double(), right.double(), (inputs["labels"] >= 0).sum().double()])

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        """The metrics of an evaluation from its `sums`."""
        loss, right, targets = sums
        mean = float(loss / targets)
        return {"loss": mean, "perplexity": float(np.exp(min(mean, 80.0))), "accuracy": float(right / targets)}

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

    def _batch(self, rows: StepRows, seconds_waited: float) -> StepBatch:
        """Copy a step out of the stream's buffer, which the next step will overwrite, and cut it in micro-batches."""
        device = self.runtime.device
        whole = {name: torch.from_numpy(a.astype(np.int64)).to(device) for name, a in self.arrays(rows).items()}
        return StepBatch(
            data_step=rows.step,
            row_numbers=rows.row_numbers.copy(),
            micro_batches=_cut(whole, self.runtime.batch.micro_batch_rows),
            targets=int((rows.labels >= 0).sum()),
            digest=rows.digest.copy(),
            cursors=rows.cursors.copy(),
            pairs=int((rows.pairs[:, :, 3] >= 0).sum()),
            bad_samples=rows.bad_samples,
            bad_sample_reports=rows.bad_sample_reports,
            seconds_waited=seconds_waited,
        )


def _valid_batches(recipe: MaskedLmRecipe, tokens_per_batch: int) -> int:
    """How many global batches an evaluation takes: as asked, or as many as the held-out tokens fill."""
    if recipe.evaluate.batches is not None or recipe.data.valid is None:
        return recipe.evaluate.batches or 0
    tokens = Corpus.open(recipe.data.valid, text_field=recipe.data.text_field).total_tokens
    if tokens is None:
        raise RecipeError(
            f"evaluate.batches is null (all of data.valid), but nobody counted the tokens of the text shards in "
            f"{recipe.data.valid}; give a number"
        )
    return max(1, tokens // tokens_per_batch)


def _cut(whole: dict[str, Tensor], micro_batch_rows: int) -> list[Inputs]:
    pieces = {name: torch.split(tensor, micro_batch_rows) for name, tensor in whole.items()}
    return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]
