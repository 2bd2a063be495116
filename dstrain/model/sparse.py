"""Masked-language modelling whose head and softmax run on the masked positions only; alone, or with pairs."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstrain.model.encoder import encode_packed, predict_pairs, predict_tokens

IGNORED = -100  # label of a slot that holds nothing


class SparseMaskedLm(nn.Module):
    """A Transformers masked-LM model that returns the *sum* of the cross-entropies of a micro-batch.

    A sum, because only the step knows by how many targets to divide: the mean over a micro-batch would weigh
    targets differently in every split of the global batch. Under 15 % masking the head works on 15 % of the tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, masked_positions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses and number of right predictions, both fp32 scalars.

        Args:
            input_ids: int64 (rows, tokens), masked.
            position_ids: int64 (rows, tokens), 0 where a document starts.
            masked_positions: int64 (rows, masked).
            labels: int64 (rows, masked), `IGNORED` in slots that hold nothing.
        """
        hidden = encode_packed(self.model, input_ids, position_ids)
        return summed(predict_tokens(self.model, hidden_at(hidden, masked_positions)), labels)


class SparsePreTraining(nn.Module):
    """BertForPreTraining that does the same, and judges of each pair whether its two texts belong together.

    After a forward pass `pair_sums` holds the pairs' own: sum of the losses and number right, fp32 (2,).
    """

    pair_sums: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
        pair_starts: Tensor,
        pair_labels: Tensor,
        pair_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and number of right predictions of masked tokens, both fp32 scalars.

        Args:
            input_ids, position_ids, masked_positions, labels: as for `SparseMaskedLm`; every pair is a document.
            token_type_ids: int64 (rows, tokens), 1 in the second text of a pair.
            pair_starts: int64 (rows, pairs), where the pairs have their [CLS].
            pair_labels: int64 (rows, pairs), 0 or 1; `IGNORED` in slots that hold nothing.
            pair_weight: fp32 scalar, what the loss of a pair counts beside that of a masked token.
        """
        hidden = encode_packed(self.model, input_ids, position_ids, token_type_ids=token_type_ids)
        loss, right = summed(predict_tokens(self.model, hidden_at(hidden, masked_positions)), labels)
        pair_loss, pairs_right = summed(predict_pairs(self.model, hidden_at(hidden, pair_starts)), pair_labels)
        self.pair_sums = torch.stack([pair_loss.detach(), pairs_right])
        return loss + pair_weight * pair_loss, right


def hidden_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Of (rows, tokens, hidden_size) those at `positions` (rows, n), as (rows × n, hidden_size)."""
    width = hidden.shape[-1]
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, width)).view(-1, width)


def summed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies and number of right predictions, fp32; of (n, classes) and as many labels."""
    logits, targets = logits.float(), labels.reshape(-1)
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        right = (logits.argmax(dim=-1) == targets).sum(dtype=torch.float32)
    return loss, right
