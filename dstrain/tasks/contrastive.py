"""InfoNCE over a whole global batch, and its gradient by embedding, whatever the batch is split into.

    every text ─► embeddings, no gradient ─► all ranks' together ─► loss, and its gradient by each embedding
    micro-batch ─► its embeddings again, with gradient ─► backward from their share of that

The chain rule needs no more: a parameter's gradient is the sum over texts of what each embedding hands down (gradient
caching, Gao et al. 2021). So memory is that of a micro-batch, and negatives are those of the global batch.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ROWS_AT_ONCE = 1024  # of the similarity matrix; memory is this × texts


@dataclass(frozen=True)
class Contrast:
    """Of a global batch: the loss of each row, whether its document came first, and the sum's gradients."""

    losses: Tensor  # fp32 (rows,)
    right: Tensor  # fp32 (rows,)
    query_gradients: Tensor  # fp32 (rows, hidden_size)
    document_gradients: Tensor  # fp32 (documents, hidden_size)


def contrast(
    queries: Tensor,
    documents: Tensor,
    targets: NDArray[np.int64],
    negatives: NDArray[np.bool_],
    *,
    offsets: NDArray[np.float32],
    temperature: float,
    symmetric: bool,
) -> Contrast:
    """The loss of each query against all documents; where `symmetric`, half of it, and half of its document's against
    all queries.

    Args:
        queries: unit vectors, fp32 (rows, hidden_size).
        documents: the same of all documents, fp32 (documents, hidden_size).
        targets: (rows,) which document is that of each query.
        negatives: (rows, documents) which documents each query is trained away from; its target is not one.
        offsets: (documents,) what is added to the similarities that queries choose by.
        temperature: divides the similarities.
        symmetric: whether documents also choose among queries.
    """
    queries, documents = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    place, allowed = torch.tensor(targets).to(queries.device), torch.tensor(negatives).to(queries.device)
    own, added = torch.arange(len(queries), device=queries.device), torch.tensor(offsets, device=queries.device)
    allowed[own, place] = True
    share = 0.5 if symmetric else 1.0
    losses, right = torch.zeros(len(queries), device=queries.device), torch.zeros(len(queries), device=queries.device)
    with torch.enable_grad():
        for rows in torch.split(own, ROWS_AT_ONCE):
            logits = (queries[rows] @ documents.T / temperature + added).masked_fill(~allowed[rows], -torch.inf)
            _add(losses, rows, logits, place[rows], share)
            right[rows] = (logits.argmax(dim=-1) == place[rows]).float()
            if symmetric:
                chosen = place[rows]
                logits = (documents[chosen] @ queries.T / temperature).masked_fill(~allowed[:, chosen].T, -torch.inf)
                _add(losses, rows, logits, rows, share)
    assert queries.grad is not None and documents.grad is not None
    return Contrast(losses, right, queries.grad, documents.grad)


def _add(losses: Tensor, rows: Tensor, logits: Tensor, targets: Tensor, share: float) -> None:
    """Add the rows' cross-entropies × share, and their gradients to the leaves."""
    each = share * nn.functional.cross_entropy(logits, targets, reduction="none")
    each.sum().backward()  # type: ignore[no-untyped-call]
    losses[rows] += each.detach()


def negatives_of(known: Sequence[Set[int]], documents: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(rows, documents): whether a document of the batch is none that is known to answer the row's query.

    Args:
        known: numbers of those documents, for each row.
        documents: the number of each document of the batch; the same document may be there several times.
    """
    return np.stack([~np.isin(documents, list(each)) for each in known])
