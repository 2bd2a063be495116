"""Whether probabilities mean what they say: predictions of like confidence counted together, a few numbers an example.

An example may hold one prediction (its label) or many (a tag for each word); added up over examples, their bins give
the expected calibration error (Guo et al. 2017).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 10  # of equal width


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of like confidence: how many, how confident on average, and what share was right."""

    predictions: int
    confidence: float
    accuracy: float


def binned(confidence: ArrayLike, right: ArrayLike) -> list[list[float]]:
    """The bins of an example's predictions: number of the bin, predictions, sum of their confidence, how many right.

    Args:
        confidence: (predictions,) probabilities of what was predicted; what has none, a NaN, is left out.
        right: (predictions,) whether it is so.
    """
    sure, hits = np.atleast_1d(np.asarray(confidence, np.float64)), np.atleast_1d(np.asarray(right, bool))
    sure, hits = sure[np.isfinite(sure)], hits[np.isfinite(sure)]
    places = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    return [
        [place, int(here.sum()), round(float(sure[here].sum()), 6), int(hits[here].sum())]
        for place in np.unique(places).tolist()
        for here in [places == place]
    ]


def calibration(judged: Sequence[dict[str, Any]]) -> tuple[list[CalibrationBin], float]:
    """The bins of all examples, empty ones left out, and the expected calibration error.

    The error is the mean over predictions of |confidence - accuracy| of their bin. Without predictions it is 0.

    Args:
        judged: of each example, what `binned` gave under `calibration`, if anything.
    """
    sums = np.zeros((BINS, 3))
    for each in judged:
        for place, *counts in each.get("calibration", []):
            sums[int(place)] += counts
    bins = [CalibrationBin(int(count), sure / count, hits / count) for count, sure, hits in sums.tolist() if count]
    error = sum(each.predictions * abs(each.confidence - each.accuracy) for each in bins)
    return bins, error / max(sum(each.predictions for each in bins), 1)
