"""How sure a score is, by bootstrap over examples; and which examples went most wrong."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Judged = dict[str, Any]  # a line of predictions-SPLIT.jsonl, see `dstrain.tasks.task.Task.predictions`
Floats = NDArray[np.float64]
Statistic = Callable[[Floats], dict[str, Floats]]  # how often each example is drawn → scores of each sample, by name

RESAMPLES = 1000
AT_ONCE = 50  # resamples; memory is this × examples
LEVEL = 0.95
LEAST_VARIANCE = 1e-9  # of values whose range is 1; below it a sample has but one of them


@dataclass(frozen=True)
class Interval:
    """A score over all examples, and between which values 95 % of its resamples lie."""

    value: float
    low: float
    high: float


def intervals(judged: Sequence[Judged], labels: Collection[str] = (), seed: int = 0) -> dict[str, Interval]:
    """Confidence intervals by the percentile bootstrap (Efron & Tibshirani 1993), examples drawn with replacement.

    1,000 resamples of the examples, the same in every run. Each score is worked out anew in each of them, ranks for
    Spearman's correlation too; but for AUROC, whose pseudo-values are averaged. A resample in which a score is not
    defined does not count for it; a score that is not defined over all examples is left out.

    Args:
        judged: what was said of each example.
        labels: those that count in the macro F1 even where no example has them.
        seed: of the draw.
    """
    if not judged:
        return {}
    statistics = list(_statistics(judged, labels))
    parts = [{name: score for of in statistics for name, score in of(drawn).items()} for drawn in _draws(judged, seed)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: _interval(values) for name, values in found.items() if np.isfinite(values[0])}


def _draws(judged: Sequence[Judged], seed: int) -> Iterator[Floats]:
    """How often each example is drawn, (samples, examples): the examples themselves, then their resamples."""
    draw, count = np.random.default_rng(seed), len(judged)
    yield np.ones((1, count))
    for _ in range(RESAMPLES // AT_ONCE):
        yield draw.multinomial(count, np.full(count, 1 / count), AT_ONCE).astype(np.float64)


def _interval(values: Floats) -> Interval:
    low, high = np.nanquantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[0]), float(low), float(high))


# ---------------------------------------------------------------- scores of samples


def _statistics(judged: Sequence[Judged], labels: Collection[str]) -> Iterator[Statistic]:
    """What can be worked out of these examples."""
    for kind, mean in (("scores", _mean), ("pseudo_values", _bounded_mean)):
        for name in _names(judged, kind):
            own = [each.get(kind, {}).get(name) for each in judged]
            yield _summed(name, [[value or 0.0, value is not None] for value in own], mean)
    for name in _names(judged, "sums"):
        score = {"bleu": _corpus_bleu, "chrf": _corpus_chrf}.get(name, _ratio)
        yield _summed(name, [each["sums"][name] for each in judged], score)
    if all("label" in each for each in judged):
        yield _label_scores([[each["label"]] for each in judged], [[each["predicted"]] for each in judged], labels)
    elif all("labels" in each for each in judged):
        yield _label_scores([each["labels"] for each in judged], [each["predicted"] for each in judged], labels)
    elif all("number" in each for each in judged):
        yield _correlations(*(np.array([each[side] for each in judged], float) for side in ("number", "predicted")))


def _names(judged: Sequence[Judged], kind: str) -> list[str]:
    return list(dict.fromkeys(name for each in judged for name in each.get(kind, {})))


def _summed(name: str, values: Sequence[Sequence[float]], score: Callable[[Floats], Floats]) -> Statistic:
    """A score of sums over examples. `values` are (examples, columns), `score` takes (samples, columns)."""
    columns = np.array(values, np.float64)
    return lambda drawn: {name: score(drawn @ columns)}


def _mean(sums: Floats) -> Floats:
    """(samples,) from (samples, 2): sum and number of the examples that have it; NaN where there is none."""
    return _ratio(sums, np.nan)


def _bounded_mean(sums: Floats) -> Floats:
    """The same of pseudo-values, whose mean may pass the bounds of what they stand for."""
    return np.clip(_mean(sums), 0.0, 1.0)


def _ratio(sums: Floats, of_nothing: float = 0.0) -> Floats:
    """(samples,) from (samples, 2)."""
    over, under = sums.T
    ratio: Floats = np.divide(over, under, out=np.full_like(over, of_nothing), where=under > 0)
    return ratio


def _corpus_bleu(sums: Floats) -> Floats:
    """(samples,) from (samples, 10): right and all n-grams of 1 to 4 words, and words written and of the reference."""
    from sacrebleu.metrics import BLEU

    counts = sums.astype(np.int64).tolist()
    smooth = {"smooth_method": "exp"}  # as its corpus scores have it
    return np.array([BLEU.compute_bleu(one[:4], one[4:8], one[8], one[9], **smooth).score for one in counts])


def _corpus_chrf(sums: Floats) -> Floats:
    """(samples,) from (samples, 18): n-grams of 1 to 6 characters written, of the reference, and of both."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()  # has no public name for this
    return np.array([chrf._compute_score_from_stats(one).score for one in sums.tolist()])


def _label_scores(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Collection[str]
) -> Statistic:
    """F1s over labels, and for one label an example Matthews' correlation (Gorodkin 2004), as scikit-learn has them.

    A label that a sample lacks has F1 0 there.
    """
    listed = sorted({*labels, *(label for side in (true, predicted) for one in side for label in one)})
    there, said = (np.array([[label in one for label in listed] for one in side], float) for side in (true, predicted))
    only_one = all(len(one) == 1 for one in true)

    def scores(drawn: Floats) -> dict[str, Floats]:
        hits, wanted, found = drawn @ (there * said), drawn @ there, drawn @ said  # (samples, labels)
        f1 = np.divide(2 * hits, wanted + found, out=np.zeros_like(hits), where=wanted + found > 0)
        micro = np.stack([2 * hits.sum(axis=1), (wanted + found).sum(axis=1)], axis=1)
        weighted = np.stack([(f1 * wanted).sum(axis=1), wanted.sum(axis=1)], axis=1)
        averages = {
            "macro_f1": f1.mean(axis=1),
            "micro_f1": _ratio(micro),
            "weighted_f1": _ratio(weighted),
        }
        return averages | ({"matthews": _matthews(hits, wanted, found)} if only_one else {})

    return scores


def _matthews(hits: Floats, wanted: Floats, found: Floats) -> Floats:
    """(samples,) from (samples, labels), and 0 where all examples have one label, or get one."""
    total = wanted.sum(axis=1)
    covariance = hits.sum(axis=1) * total - (wanted * found).sum(axis=1)
    variances = (total**2 - (wanted**2).sum(axis=1)) * (total**2 - (found**2).sum(axis=1))
    return _ratio(np.stack([covariance, np.sqrt(variances)], axis=1))


def _correlations(true: Floats, predicted: Floats) -> Statistic:
    """Pearson's, and Spearman's with the ranks of each sample."""

    def scores(drawn: Floats) -> dict[str, Floats]:
        ranks = (_ranks(drawn, side) for side in (true, predicted))
        return {"pearson": _pearson(drawn, true[None], predicted[None]), "spearman": _pearson(drawn, *ranks)}

    return scores


def _ranks(drawn: Floats, values: Floats) -> Floats:
    """(samples, examples): ranks within each sample, the mean of them for values that are equal."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(drawn[:, order], axis=1)[:, np.cumsum(counts) - 1]  # (samples, distinct values)
    below = np.pad(upto[:, :-1], ((0, 0), (1, 0)))
    ranks: Floats = ((below + upto + 1) / 2)[:, place]
    return ranks


def _pearson(drawn: Floats, first: Floats, second: Floats) -> Floats:
    """(samples,), NaN where one side has a single value. Sides are (samples, examples), or (1, examples) for all."""
    total = drawn.sum(axis=1, keepdims=True)
    deviations = []
    for side in (first, second):
        scaled = (side - side.mean()) / (np.ptp(side) or 1.0)
        deviations.append(scaled - (drawn * scaled).sum(axis=1, keepdims=True) / total)
    one, other = deviations
    variances = (drawn * one**2).sum(axis=1) * (drawn * other**2).sum(axis=1)
    covariance = (drawn * one * other).sum(axis=1)
    defined = np.where(variances > LEAST_VARIANCE**2, variances, np.nan)
    correlation: Floats = covariance / np.sqrt(defined)
    return correlation


# ---------------------------------------------------------------- the worst


def worst(judged: Sequence[Judged], how_many: int) -> list[Judged]:
    """The examples that went most wrong, and among those alike the most confident first."""
    wrong = [each for each in judged if each.get("badness", 0.0) > 0]
    return sorted(wrong, key=lambda each: (-each["badness"], -each.get("confidence", 0.0)))[:how_many]
