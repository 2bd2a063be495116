"""Rows of several documents, and the mask that keeps those apart. torch is imported where it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedRows:
    """What an encoder is given of rows that hold several documents, none of which may see another.

    Attributes:
        input_ids: int64 (rows, tokens).
        position_ids: int64 (rows, tokens), 0 at the first token of every document in the row.
        same_document: bool (rows, 1, tokens, tokens), True where both tokens are of one document.
        token_types: as `token_type_ids`, int64 (rows, tokens); empty where all are of type 0.
    """

    input_ids: "Tensor"
    position_ids: "Tensor"
    same_document: "Tensor"
    token_types: Mapping[str, "Tensor"] = field(default_factory=dict)


def document_mask(position_ids: "Tensor") -> "Tensor":
    """Bool (rows, 1, tokens, tokens): True where both tokens are of one document. Documents start at position 0."""
    document = (position_ids == 0).cumsum(dim=1)  # (rows, tokens)
    return (document[:, :, None] == document[:, None, :])[:, None]


def additive_mask(allowed: "Tensor", dtype: "torch.dtype") -> "Tensor":
    """0 where attention is allowed and -inf elsewhere, in the dtype of the scores that it is added to.

    Eager attention would add a boolean mask as 0 and 1, and hide nothing. SDPA would turn it into this one in every
    layer, and keep each of them for the backward pass.
    """
    import torch

    mask = torch.zeros_like(allowed, dtype=dtype)
    mask[~allowed] = -torch.inf
    return mask


def encode_rows(model: "PreTrainedModel", rows: PackedRows, mask: Any, position_ids: "Tensor") -> "Tensor":
    """Hidden states (rows, tokens, hidden_size) of a Transformers encoder that takes masks of four dimensions.

    Args:
        model: with a head or without one.
        rows: give ids and token types.
        mask: what is added to scores, from `additive_mask`; or by name of a kind of layer, where they differ.
        position_ids: int64 (rows, tokens), as the model embeds them.
    """
    outputs = model.base_model(
        input_ids=rows.input_ids, attention_mask=mask, position_ids=position_ids, **rows.token_types
    )
    hidden: Tensor = outputs.last_hidden_state
    return hidden
