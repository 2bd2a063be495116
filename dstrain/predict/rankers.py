"""What retrieval is made of, ready to use: texts as vectors, and pairs of texts as scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dstrain.model.pooling import pooled
from dstrain.predict.loaded import Loaded
from dstrain.tasks.batching import encoded, encoded_pairs

DECIMALS = 6  # of vectors and scores in JSON


class TextEmbedder:
    """Texts as unit vectors, whose products are cosines."""

    fields: tuple[str, ...] = ("text",)
    tokens_field: str | None = None

    def __init__(self, loaded: Loaded) -> None:
        """`loaded`: a bi-encoder."""
        self._loaded = loaded

    def vectors(self, texts: Sequence[str], batch_rows: int) -> NDArray[np.float32]:
        """fp32 (texts, hidden_size), in order."""
        rows = encoded(self._loaded.encoder, texts, self._loaded.length)
        found = np.empty((len(rows), self._loaded.model.config.hidden_size), np.float32)
        for places, outputs in self._loaded.batches(rows, (), batch_rows):
            hidden = outputs.last_hidden_state
            lengths = torch.tensor([len(rows[place]) for place in places])
            mask = torch.arange(hidden.shape[1])[None] < lengths[:, None]
            found[places] = pooled(hidden, mask, self._loaded.pooling).numpy()
        return found

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: `embedding`."""
        vectors = self.vectors([text for (text,) in values], batch_rows).astype(np.float64).round(DECIMALS)
        return [{"embedding": vector} for vector in vectors.tolist()]


class PairScorer:
    """How well a document answers a query: a number that orders the documents of one query."""

    fields: tuple[str, ...] = ("query", "document")
    tokens_field: str | None = None

    def __init__(self, loaded: Loaded) -> None:
        """`loaded`: a cross-encoder."""
        self._loaded = loaded

    def scores(self, pairs: Sequence[tuple[str, str]], batch_rows: int) -> list[float]:
        """One for each pair, in order."""
        rows = encoded_pairs(self._loaded.encoder, pairs, self._loaded.length, self._loaded.separators)
        found = np.empty(len(rows))
        for places, outputs in self._loaded.batches([ids for ids, _ in rows], [start for _, start in rows], batch_rows):
            found[places] = outputs.logits[:, 0].float().numpy()
        return [float(score) for score in found]

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: `score`."""
        scores = self.scores([(query, document) for query, document in values], batch_rows)
        return [{"score": round(score, DECIMALS)} for score in scores]
