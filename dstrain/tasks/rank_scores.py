"""How good a ranking is: nDCG, reciprocal rank and recall, as trec_eval has them, cut off at a rank.

A document's gain is its score, divided by log2(1 + rank) (Järvelin & Kekäläinen 2002); the ideal ranking is of all
judged documents, found or not. A query without a relevant document scores 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CUT = 10
DEEP = 100
MEASURES = (f"ndcg_{CUT}", f"mrr_{CUT}", f"recall_{CUT}", f"recall_{DEEP}")


def ranking_scores(ranked: Sequence[str], relevance: Mapping[str, float]) -> dict[str, float]:
    """The measures of one query.

    Args:
        ranked: documents, the best first, `DEEP` of them or as many as there are.
        relevance: score of each judged document; one above 0 is relevant.
    """
    gains = [relevance.get(key, 0.0) for key in ranked[:DEEP]]
    ideal = sorted((score for score in relevance.values() if score > 0), reverse=True)
    if not ideal:
        return dict.fromkeys(MEASURES, 0.0)
    first = next((rank for rank, gain in enumerate(gains[:CUT], start=1) if gain > 0), math.inf)
    found = [sum(gain > 0 for gain in gains[:depth]) / len(ideal) for depth in (CUT, DEEP)]
    values = (_discounted(gains[:CUT]) / _discounted(ideal[:CUT]), 1 / first, *found)
    return dict(zip(MEASURES, values, strict=True))


def judged_ranking(ranked: Sequence[str], relevance: Mapping[str, float]) -> dict[str, Any]:
    """The measures of one query, and how far they are from 1 on average, as `Task.predictions` has them."""
    scores = ranking_scores(ranked, relevance)
    return {"badness": 1 - sum(scores.values()) / len(scores), "scores": scores}


def mean_scores(of_each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over queries."""
    return {name: float(np.mean([scores[name] for scores in of_each])) for name in MEASURES}


def list_losses(logits: NDArray[np.floating], relevant: Sequence[int]) -> list[float]:
    """Cross-entropy of each relevant document against all that are not relevant.

    Args:
        logits: (documents,) of one query; those of documents that do not count are -inf.
        relevant: places of the relevant ones.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    chosen = values[list(relevant)]
    values[list(relevant)] = -np.inf
    rest = np.exp(values).sum()
    return [float(np.log(rest + np.exp(own)) - own) for own in chosen]


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(1 + rank) for rank, gain in enumerate(gains, start=1))
