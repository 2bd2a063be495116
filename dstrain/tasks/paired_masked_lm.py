"""Masked-language modelling with next-sentence or sentence-order prediction beside it: `data.pairs` of a recipe."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForPreTraining, PreTrainedModel

from dstrain.data.pairs import token_types
from dstrain.data.rows import StepRows
from dstrain.model.encoder import encode_packed, predict_pairs, predict_tokens
from dstrain.model.sparse import SparsePreTraining
from dstrain.tasks.masked_lm import MaskedLm
from dstrain.tasks.task import MicroBatch, StepBatch


class PairedMaskedLm(MaskedLm):
    """The `masked_lm` task with pairs, on one rank.

    The loss of a step is the mean over its masked tokens plus the mean over its pairs.
    """

    auto_model = AutoModelForPreTraining
    wrapper = SparsePreTraining
    module: SparsePreTraining

    def arrays(self, rows: StepRows) -> dict[str, NDArray[np.integer]]:
        """See `MaskedLm`."""
        return super().arrays(rows) | {
            "token_type_ids": token_types(rows.pairs, rows.input_ids.shape[1]),
            "pair_starts": rows.pairs[:, :, 0],
            "pair_labels": rows.pairs[:, :, 3],
        }

    def completed(self, batches: Sequence[StepBatch]) -> Sequence[StepBatch]:
        """See `Task`: what a pair counts, so that the loss, divided by the masked tokens, is the sum of two means."""
        own = [sum(batch.targets for batch in batches), sum(batch.pairs for batch in batches)]
        targets, pairs = self.runtime.all_reduce_sum(own)
        weight = torch.tensor(targets / max(pairs, 1), dtype=torch.float32, device=self.runtime.device)
        return [
            replace(batch, micro_batches=[each.with_inputs(pair_weight=weight) for each in batch.micro_batches])
            for batch in batches
        ]

    def sums(self, module: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """See `MaskedLm`: loss, right and targets of the pairs come after those of the masked tokens, fp64 (6,)."""
        without_pairs = micro_batch.with_inputs(pair_weight=torch.zeros((), device=self.runtime.device))
        masked = super().sums(module, without_pairs)
        pairs = (micro_batch.inputs["pair_labels"] >= 0).sum(dtype=torch.float64)
        return torch.cat([masked, self.module.pair_sums.double(), pairs[None]])

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        """See `MaskedLm`: loss, perplexity and accuracy are those of the masked tokens."""
        loss, right, _ = sums[3:] / max(sums[5], 1.0)
        return super().metrics(sums[:3]) | {"pair_loss": float(loss), "pair_accuracy": float(right)}

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one packed row; each gives its tokens' logits and then its pair's, in a line.

        A document's second half is the second text of a pair.
        """
        row, lengths = torch.cat(list(documents))[None], [len(document) for document in documents]
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        types = torch.cat([_halves(document) for document in documents])[None]
        hidden = encode_packed(model, row, position_ids, token_type_ids=types)[0]
        tokens = torch.split(predict_tokens(model, hidden), lengths)
        pairs = predict_pairs(model, hidden[position_ids[0] == 0])
        return [torch.cat([own.flatten(), pair]) for own, pair in zip(tokens, pairs, strict=True)]

    @classmethod
    def logits_alone(cls, model: PreTrainedModel, document: Tensor) -> Tensor:
        """See `Task`."""
        outputs = model(input_ids=document[None], token_type_ids=_halves(document)[None])
        return torch.cat([outputs.prediction_logits.flatten(), outputs.seq_relationship_logits[0]])


def _halves(document: Tensor) -> Tensor:
    """Token types of a document, int64 (tokens,): 1 in its second half."""
    return (2 * torch.arange(len(document)) >= len(document)).long()
