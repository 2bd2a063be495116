"""Masked-language modelling whose head and softmax run on the masked positions only; alone, or with pairs."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstrain.model.encoder import encode_packed, predict_pairs, predict_tokens

IGNORED = -100  # label of a slot that holds nothing


class Objective(nn.Module):
    """What an objective trains: its forward pass takes what the objective's `arrays` gives, by name, and `sources`.

    It returns of each term of the loss the *sum* of the losses and the number of right predictions: fp32 (terms,), or
    scalars where there is one term. Sums, because only the step knows by how many targets to divide: the mean over a
    micro-batch would weigh targets differently in every split of the global batch.

    `model` is what checkpoints hold. Given the sources of the rows, int64 (rows,), `source_sums` holds after a forward
    pass what each of them has in the first term: sum of the losses, right predictions and targets, fp64 (sources, 3).
    """

    model: PreTrainedModel
    source_sums: Tensor | None = None


class SparseMaskedLm(Objective):
    """A Transformers masked-LM model that returns the *sum* of the cross-entropies of a micro-batch.

    Under 15 % masking the head works on 15 % of the tokens.
    """

    def __init__(self, model: PreTrainedModel, source_count: int = 1) -> None:
        super().__init__()
        self.model = model
        self.source_count = source_count

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
        sources: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses and number of right predictions, both fp32 scalars.

        Args:
            input_ids: int64 (rows, tokens), masked.
            position_ids: int64 (rows, tokens), 0 where a document starts.
            masked_positions: int64 (rows, masked).
            labels: int64 (rows, masked), `IGNORED` in slots that hold nothing.
            sources: int64 (rows,), below `source_count`; None: nobody asks for them.
        """
        hidden = encode_packed(self.model, input_ids, position_ids)
        return self.masked_sums(hidden, masked_positions, labels, sources)

    def masked_sums(
        self, hidden: Tensor, masked_positions: Tensor, labels: Tensor, sources: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, from hidden states (rows, tokens, hidden_size)."""
        logits = predict_tokens(self.model, hidden_at(hidden, masked_positions))
        if sources is None:
            return summed(logits, labels)
        losses, right = each_loss(logits, labels)
        with torch.no_grad():
            of_rows = torch.stack([losses, right, (labels.flatten() != IGNORED).float()], dim=-1)
            of_rows = of_rows.view(*labels.shape, 3).sum(dim=1)  # (rows, 3)
            is_of = sources == torch.arange(self.source_count, device=sources.device)[:, None]  # (sources, rows)
            self.source_sums = is_of.double() @ of_rows.double()
        return losses.sum(), right.sum()


class SparsePreTraining(SparseMaskedLm):
    """BertForPreTraining that does the same, and judges of each pair whether its two texts belong together."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
        pair_starts: Tensor,
        pair_labels: Tensor,
        sources: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums of the losses and numbers of right predictions of masked tokens and of pairs, both fp32 (2,).

        Args:
            input_ids, position_ids, masked_positions, labels: as for `SparseMaskedLm`; every pair is a document.
            token_type_ids: int64 (rows, tokens), 1 in the second text of a pair.
            pair_starts: int64 (rows, pairs), where the pairs have their [CLS].
            pair_labels: int64 (rows, pairs), 0 or 1; `IGNORED` in slots that hold nothing.
            sources: as for `SparseMaskedLm`.
        """
        hidden = encode_packed(self.model, input_ids, position_ids, token_type_ids=token_type_ids)
        loss, right = self.masked_sums(hidden, masked_positions, labels, sources)
        pair_loss, pairs_right = summed(predict_pairs(self.model, hidden_at(hidden, pair_starts)), pair_labels)
        return torch.stack([loss, pair_loss]), torch.stack([right, pairs_right])


def hidden_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Of (rows, tokens, hidden_size) those at `positions` (rows, n), as (rows × n, hidden_size)."""
    width = hidden.shape[-1]
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, width)).view(-1, width)


def each_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies, and whether predictions are right, fp32 (n,); of (n, classes) and as many labels."""
    logits, targets = logits.float(), labels.reshape(-1)
    losses = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    with torch.no_grad():
        right = (logits.argmax(dim=-1) == targets).float()
    return losses, right


def summed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies and number of right predictions, fp32; of (n, classes) and as many labels."""
    logits, targets = logits.float(), labels.reshape(-1)
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        right = (logits.argmax(dim=-1) == targets).sum(dtype=torch.float32)
    return loss, right
