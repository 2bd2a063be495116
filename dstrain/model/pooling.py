"""Texts as unit vectors: an encoder without a head, and what makes one vector of a text's hidden states."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel


class AutoEncoder:
    """Builds encoders as Transformers' AutoModel does, without the pooler that BERT and RoBERTa have."""

    @staticmethod
    def from_config(config: Any, **keys: Any) -> PreTrainedModel:
        """See `AutoModel.from_config`."""
        return _without_pooler(AutoModel.from_config(config, **keys))

    @staticmethod
    def from_pretrained(folder: Any, **keys: Any) -> PreTrainedModel:
        """See `AutoModel.from_pretrained`."""
        return _without_pooler(AutoModel.from_pretrained(folder, **keys))


def _without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Unit vectors, fp32 (rows, hidden_size), of hidden states (rows, tokens, hidden_size).

    Args:
        hidden: of the last layer.
        attention_mask: (rows, tokens), 0 at padding.
        pooling: `mean` over tokens, or `cls` for the first one.
    """
    if pooling == "cls":
        vectors = hidden[:, 0].float()
    else:
        mask = attention_mask[:, :, None].float()
        vectors = (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)
    return nn.functional.normalize(vectors, dim=-1)
