"""How sure a score is: bootstrap confidence intervals over examples, and whether probabilities mean what they say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Judged = dict[str, Any]  # a line of predictions-SPLIT.jsonl, see `dstrain.tasks.task.Task.predictions`
Floats = NDArray[np.float64]

BLEU = "bleu"
RESAMPLES = 1000
AT_ONCE = 50  # resamples; memory is this × examples
LEVEL = 0.95
BINS = 10


@dataclass(frozen=True)
class Interval:
    """A score over all examples, and between which values 95 % of its resamples lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of like confidence: how many, how confident on average, and what share was right."""

    examples: int
    confidence: float
    accuracy: float


def intervals(judged: Sequence[Judged], seed: int = 0) -> dict[str, Interval]:
    """Confidence intervals by the percentile bootstrap (Efron & Tibshirani 1993), examples drawn with replacement.

    Of the means of every entry of `scores`, of the F1 of every entry of `counts` (hits, predicted, true), and of the
    macro F1 where examples have one label each, and of BLEU where they have its counts. 1,000 resamples of the
    examples, the same in every run.
    """
    if not judged:
        return {}
    columns: dict[str, Floats] = {}  # by score, what is added up over examples: (examples, 1 or 3 each label)
    if "bleu_counts" in judged[0]:
        columns[BLEU] = np.array([each["bleu_counts"] for each in judged], np.float64)
    for name in judged[0].get("scores", {}):
        columns[name] = np.array([[each["scores"][name]] for each in judged], np.float64)
    for name in judged[0].get("counts", {}):
        columns[name] = np.array([each["counts"][name] for each in judged], np.float64)
    if all("label" in each for each in judged):
        columns["macro_f1"] = _label_counts(judged)
    sums = _resampled_sums(np.concatenate(list(columns.values()), axis=1), seed)  # (1 + resamples, all columns)
    found, start = {}, 0
    for name, values in columns.items():
        part = sums[:, start : start + values.shape[1]]
        score = _corpus_bleu if name == BLEU else _mean_f1 if part.shape[1] > 1 else lambda one: one[:, 0] / len(judged)
        found[name] = _interval(score(part))
        start += values.shape[1]
    return found


def _corpus_bleu(sums: Floats) -> Floats:
    """(samples,) from (samples, 10): right and all n-grams of 1 to 4 words, and words written and of the reference."""
    from sacrebleu.metrics import BLEU as Bleu

    counts = sums.astype(np.int64).tolist()
    smooth = {"smooth_method": "exp"}  # as its corpus scores have it
    return np.array([Bleu.compute_bleu(one[:4], one[4:8], one[8], one[9], **smooth).score for one in counts])


def _label_counts(judged: Sequence[Judged]) -> Floats:
    """(examples, 3 × labels): for each label that occurs or is predicted whether it is a hit, predicted, true."""
    true = np.array([each["label"] for each in judged])
    predicted = np.array([each["predicted"] for each in judged])
    parts = []
    for label in sorted({*true.tolist(), *predicted.tolist()}):
        is_true, is_predicted = true == label, predicted == label
        parts += [is_true & is_predicted, is_predicted, is_true]
    return np.stack(parts, axis=1).astype(np.float64)


def _resampled_sums(values: Floats, seed: int) -> Floats:
    """Sums of the columns over the examples themselves, then over each resample of them."""
    draw, count = np.random.default_rng(seed), len(values)
    sums = [values.sum(axis=0, keepdims=True)]
    for _ in range(RESAMPLES // AT_ONCE):  # how often each example is drawn: (resamples, examples)
        sums.append(draw.multinomial(count, np.full(count, 1 / count), AT_ONCE) @ values)
    return np.concatenate(sums)


def _mean_f1(sums: Floats) -> Floats:
    """(samples,) from (samples, 3 × labels); a label that a sample lacks has F1 0 there."""
    hits, predicted, true = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    total = predicted + true
    f1: Floats = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
    means: Floats = f1.mean(axis=1)
    return means


def _interval(values: Floats) -> Interval:
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[0]), float(low), float(high))


def calibration(judged: Sequence[Judged]) -> tuple[list[CalibrationBin], float]:
    """Bins of equal width over the confidence, empty ones left out, and the expected calibration error.

    The error is the mean over examples of |confidence - accuracy| of their bin (Guo et al. 2017).
    """
    sure = np.array([each["confidence"] for each in judged], np.float64)
    right = np.array([each["scores"]["accuracy"] for each in judged], np.float64)
    places = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    bins = []
    for place in range(BINS):
        here = places == place
        if here.any():
            bins.append(CalibrationBin(int(here.sum()), float(sure[here].mean()), float(right[here].mean())))
    error = sum(each.examples * abs(each.confidence - each.accuracy) for each in bins) / len(judged)
    return bins, error


def worst(judged: Sequence[Judged], how_many: int) -> list[Judged]:
    """The examples that went most wrong: least score first, and among these the most confident first."""

    def badness(each: Judged) -> tuple[float, float]:
        scores = list(each.get("scores", {}).values()) or [_example_f1(each)]
        return float(np.mean(scores)), -float(each.get("confidence") or 0.0)

    return [each for each in sorted(judged, key=badness) if badness(each)[0] < 1.0][:how_many]


def _example_f1(each: Judged) -> float:
    """Least F1 of its counts; 1 where there was nothing to find, and nothing was found."""
    found = [
        2 * hits / (predicted + true) for hits, predicted, true in each.get("counts", {}).values() if predicted + true
    ]
    return min(found, default=1.0)
