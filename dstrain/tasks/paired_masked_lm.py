"""Masked-language modelling with next-sentence or sentence-order prediction beside it: `data.pairs` of a recipe."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForPreTraining, PreTrainedModel

from dstrain.data.pairs import token_types
from dstrain.data.rows import StepRows
from dstrain.model.encoder import encode_packed, predict_pairs, predict_tokens
from dstrain.model.sparse import SparsePreTraining
from dstrain.tasks.masked_lm import MaskedLm
from dstrain.tasks.task import LossTerm


class PairedMaskedLm(MaskedLm):
    """The `masked_lm` task with pairs, on one rank.

    The loss of a step is the mean over its masked tokens plus the mean over its pairs.
    """

    auto_model = AutoModelForPreTraining
    wrapper = SparsePreTraining
    terms = (LossTerm("masked"), LossTerm("pair", labels="pair_labels"))

    def arrays(self, rows: StepRows) -> dict[str, NDArray[np.integer]]:
        """See `Pretraining`."""
        return super().arrays(rows) | {
            "token_type_ids": token_types(rows.pairs, rows.input_ids.shape[1]),
            "pair_starts": rows.pairs[:, :, 0],
            "pair_labels": rows.pairs[:, :, 3],
        }

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
