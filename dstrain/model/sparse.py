"""Masked-language modelling whose head and softmax run on the masked positions only."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstrain.model.encoder import encode_packed, predict_tokens

IGNORED = -100  # label of a masked slot that a row could not fill


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
        width = hidden.shape[-1]
        chosen = hidden.gather(1, masked_positions[:, :, None].expand(-1, -1, width)).view(-1, width)
        logits = predict_tokens(self.model, chosen).float()  # (rows × masked, vocab_size)
        targets = labels.reshape(-1)
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == targets).sum(dtype=torch.float32)
        return loss, right
