"""Texts as unit vectors: an encoder without a head, and what makes one vector of a text's hidden states."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel


class AutoEncoder:
    """Builds encoders as Transformers' AutoModel does, without the pooler that BERT and RoBERTa have."""

    @staticmethod
    def from_config(config: Any, **keys: Any) -> PreTrainedModel:
        """See `AutoModel.from_config`."""
        model: PreTrainedModel = AutoModel.from_config(config, **_without_pooler(config), **keys)
        return model

    @staticmethod
    def from_pretrained(folder: Any, **keys: Any) -> PreTrainedModel:
        """See `AutoModel.from_pretrained`."""
        config = keys.get("config") or AutoConfig.from_pretrained(folder, local_files_only=True)
        model: PreTrainedModel = AutoModel.from_pretrained(folder, **_without_pooler(config), **keys)
        return model


def _without_pooler(config: Any) -> dict[str, bool]:
    """The argument that leaves the pooler out, of models that know it."""
    known = inspect.signature(MODEL_MAPPING[type(config)]).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}


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
