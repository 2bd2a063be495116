"""Attention by matrix products: for low precision on CPUs, where torch's fused kernel is slow.

Scores and softmax are computed in fp32, as the fused kernel does; what is kept for the backward pass are the
probabilities, in the precision of the model. Importing this module makes Transformers know it as `matmul`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from dstrain.runtime.softmax import softmax_backward


class _Probabilities(torch.autograd.Function):
    """softmax(query keyᵀ · scale + mask), in the query's type. Autograd by itself would keep fp32 scores too."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        # query, key: (rows, heads, tokens, width); mask: 0 or -inf, (rows, 1 or heads, tokens, tokens)
        scores = torch.matmul(query.float() * scale, key.float().transpose(2, 3))
        if mask is not None:
            scores += mask
        probabilities = torch.softmax(scores, dim=-1).to(query.dtype)
        ctx.save_for_backward(query, key, probabilities)
        ctx.scale = scale
        return probabilities

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, probabilities = ctx.saved_tensors
        of_scores = softmax_backward(gradient, probabilities, query.dtype)
        of_query = torch.matmul(of_scores, key).mul_(ctx.scale)
        of_key = torch.matmul(of_scores.transpose(2, 3), query).mul_(ctx.scale)
        return of_query, of_key, None, None


def matmul_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface of an attention, see its `AttentionInterface`.

    Args:
        query, key, value: (rows, heads, tokens, width).
        attention_mask: what is added to scores, (rows, 1, tokens, tokens), or None.
        scaling: of the scores; None: 1 ÷ √width.
        dropout: rate at which probabilities are dropped; 0 in evaluation.

    Returns:
        (rows, tokens, heads, width), and None for the probabilities, which nobody asks for.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    probabilities: Tensor = _Probabilities.apply(query, key, attention_mask, scale)  # type: ignore[no-untyped-call]
    if dropout:
        probabilities = nn.functional.dropout(probabilities, dropout)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("matmul", matmul_attention)
AttentionMaskInterface.register("matmul", eager_mask)
