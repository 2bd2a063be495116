"""Masked-language modelling: sparse prediction of the masked tokens of packed rows."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

from dstrain.data.tokens import DocumentTokenizer
from dstrain.model.encoder import build_model, encode_packed, predict_tokens
from dstrain.model.sparse import SparseMaskedLm
from dstrain.tasks.pretraining import Pretraining


class MaskedLm(Pretraining):
    """The `masked_lm` task on one rank."""

    auto_model = AutoModelForMaskedLM
    wrapper: ClassVar[type[SparseMaskedLm]] = SparseMaskedLm

    def build(self, tokenizer: DocumentTokenizer, source_count: int) -> SparseMaskedLm:
        """See `Pretraining`."""
        recipe = self.recipe
        model = build_model(recipe.model, recipe.train.seed, tokenizer.special_token_ids, auto=self.auto_model)
        return self.wrapper(model, source_count)

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one packed row; each gives (tokens, vocab_size)."""
        row = torch.cat(list(documents))[None]
        position_ids = torch.cat([torch.arange(len(document)) for document in documents])[None]
        logits = predict_tokens(model, encode_packed(model, row, position_ids)[0])
        return list(torch.split(logits, [len(document) for document in documents]))
