"""Bootstrap intervals and the worst examples, against what is known of them and against resampling done naively."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.report import intervals as under_test
from dstrain.report.intervals import intervals, worst
from dstrain.tasks.scores import label_scores, label_set_scores, number_scores

RESAMPLES = 100  # scikit-learn takes a while for each


def naive(score: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """Between which values 95 % of a score's resamples lie, worked out one by one from the indices of each."""
    draw, values = np.random.default_rng(0), []
    for _ in range(RESAMPLES // 50):
        for drawn in draw.multinomial(count, np.full(count, 1 / count), 50):
            values.append(score(np.repeat(np.arange(count), drawn)))
    return np.nanquantile(values, 0.025), np.nanquantile(values, 0.975)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "naively" in request.node.name:
        monkeypatch.setattr(under_test, "RESAMPLES", RESAMPLES)


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    judged = [{"scores": {"accuracy": float(number < 300)}} for number in range(400)]
    found = intervals(judged)["accuracy"]
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - spread, abs=0.01)
    assert found.high == pytest.approx(0.75 + spread, abs=0.01)
    assert intervals(judged) == {"accuracy": found}  # the same at each time


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=60))
@pytest.mark.slow
def test_scores_of_labels_are_scikit_learns_and_lie_in_their_intervals(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    judged = [{"label": true, "predicted": said, "scores": {"accuracy": float(true == said)}} for true, said in pairs]
    found = intervals(judged)
    true, said = zip(*pairs, strict=True)
    for average in ("macro", "micro", "weighted"):
        score = f1_score(true, said, average=average, zero_division=0.0)
        assert found[f"{average}_f1"].value == pytest.approx(score)
    assert found["matthews"].value == pytest.approx(matthews_corrcoef(true, said))
    assert found["accuracy"].value == pytest.approx(np.mean([t == s for t, s in pairs]))
    for name, interval in found.items():
        assert (-1.0 if name == "matthews" else 0.0) <= interval.low <= interval.high <= 1.0
    wider = intervals(judged, labels="abcd")["macro_f1"].value
    assert wider == pytest.approx(f1_score(true, said, labels=list("abcd"), average="macro", zero_division=0.0))


@pytest.mark.slow
def test_labels_resampled_naively_have_the_same_intervals() -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    draw = np.random.default_rng(1)
    true, noise = draw.integers(0, 3, 40), draw.normal(size=(40, 3))
    scores = label_scores(["a", "b", "c"], true, np.eye(3)[true] + noise)
    said = (np.eye(3)[true] + noise).argmax(axis=1)
    found = intervals(scores["judged"])
    f1 = {"labels": [0, 1, 2], "zero_division": 0.0}
    by_hand: dict[str, Callable[[np.ndarray], float]] = {
        "accuracy": lambda drawn: float(np.mean(true[drawn] == said[drawn])),
        "macro_f1": lambda drawn: f1_score(true[drawn], said[drawn], average="macro", **f1),
        "micro_f1": lambda drawn: f1_score(true[drawn], said[drawn], average="micro", **f1),
        "weighted_f1": lambda drawn: f1_score(true[drawn], said[drawn], average="weighted", **f1),
        "matthews": lambda drawn: matthews_corrcoef(true[drawn], said[drawn]),
    }
    for name, score in by_hand.items():
        assert (found[name].low, found[name].high) == pytest.approx(naive(score, 40)), name
        assert found[name].value == pytest.approx(scores[name])
        assert found[name].low < found[name].value < found[name].high


def test_sets_of_labels_resampled_naively_have_the_same_intervals() -> None:
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(2)
    true = draw.integers(0, 2, (30, 3))
    logits = true - 0.5 + draw.normal(size=(30, 3))
    scores = label_set_scores(["a", "b", "c"], true, logits)
    found, said = intervals(scores["judged"]), (logits > 0).astype(int)
    for average in ("macro", "micro", "weighted"):
        interval = found[f"{average}_f1"]
        bounds = naive(lambda n, a=average: f1_score(true[n], said[n], average=a, zero_division=0.0), 30)  # type: ignore[misc]
        assert (interval.low, interval.high) == pytest.approx(bounds)
        assert interval.value == pytest.approx(scores[f"{average}_f1"])
    assert "matthews" not in found


def test_correlations_resampled_naively_have_the_same_intervals() -> None:
    from scipy.stats import pearsonr, spearmanr

    draw = np.random.default_rng(3)
    true = draw.integers(0, 6, 25).astype(float)  # with ties
    said = np.round(true + draw.normal(size=25) * 2, 1)
    scores = number_scores(true, said)
    found = intervals(scores["judged"])
    for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr)):
        bounds = naive(lambda n, of=correlation: of(true[n], said[n]).statistic, 25)  # type: ignore[misc]
        assert (found[name].low, found[name].high) == pytest.approx(bounds)
        assert found[name].value == pytest.approx(scores[name])


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_few_numbers_resampled_naively_have_the_same_intervals() -> None:
    """Some resamples are one number over and over, and have no correlation: they do not count."""
    from scipy.stats import spearmanr

    true, said = np.array([0.1, 0.2, 0.4]), np.array([1e9, 1e9 + 1, 1e9 - 5])
    found = intervals(number_scores(true, said)["judged"])["spearman"]
    assert (found.low, found.high) == pytest.approx(naive(lambda n: spearmanr(true[n], said[n]).statistic, 3))


def test_what_is_not_defined_has_no_interval() -> None:
    assert intervals([]) == {}
    alike = number_scores(np.array([0.1, 0.2, 0.3]), np.full(3, 0.1))
    assert "pearson" not in alike
    assert intervals(alike["judged"]).keys() == {"mean_squared_error", "mean_absolute_error"}


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.slow
def test_the_interval_of_auroc_is_around_it_and_that_of_resampling(labels: int) -> None:
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(4)
    true = draw.integers(0, labels, 300)
    logits = np.round(np.eye(labels)[true] + draw.normal(size=(300, labels)), 1)  # with ties
    scores = label_scores([f"{n}" for n in range(labels)], true, logits)
    found = intervals(scores["judged"])["auroc"]
    assert found.value == pytest.approx(scores["auroc"], abs=1e-12)
    odds = np.exp(logits)
    chances = odds / odds.sum(axis=1, keepdims=True)
    chances = chances[:, 1] if labels == 2 else chances
    resampled = naive(lambda n: roc_auc_score(true[n], chances[n], multi_class="ovr", labels=range(labels)), 300)
    assert (found.low, found.high) == pytest.approx(resampled, abs=0.015)


def test_the_interval_of_auroc_ends_at_one() -> None:
    logits = np.array([[1.0, 0]] * 6 + [[0, 1.0]] * 5 + [[0.4, 0.3]])
    found = intervals(label_scores(["no", "yes"], np.array([0] * 5 + [1] * 7), logits)["judged"])["auroc"]
    assert 0.5 < found.low < found.value < found.high == 1.0


@pytest.mark.parametrize("order", ["random", "with ties"])
def test_pseudo_values_have_delongs_variance(order: str) -> None:
    """By the definition: a positive counts the negatives below it, a negative the positives above it."""
    from dstrain.tasks.scores import auroc_pseudo_values

    draw = np.random.default_rng(5)
    positive, chances = draw.integers(0, 2, 20) == 1, draw.normal(size=20)
    chances = chances if order == "random" else np.round(chances)
    rightly = (chances[positive][:, None] > chances[~positive]) + 0.5 * (
        chances[positive][:, None] == chances[~positive]
    )
    pseudo = auroc_pseudo_values(positive, chances)
    assert pseudo.mean() == pytest.approx(rightly.mean())
    variance = sum(rightly.mean(axis=axis).var() / rightly.shape[1 - axis] for axis in (0, 1))
    assert pseudo.var() / 20 == pytest.approx(variance)


def test_sums_are_added_up_before_they_become_a_ratio() -> None:
    judged: list[dict[str, Any]] = [
        {"sums": {"f1": sums, "recall": [0, 0]}} for sums in ([2, 3], [0, 0], [6, 8], [0, 1])
    ]
    found = intervals(judged)
    assert found["f1"].value == pytest.approx(2 * 4 / (6 + 6))
    assert found["recall"].value == 0.0, "as with zero_division=0"


def test_a_score_that_some_examples_have_is_averaged_over_these() -> None:
    judged = [{"scores": {"f1": n / 4, **({"answerable_f1": n / 4} if n % 2 else {})}} for n in range(4)]
    found = intervals(judged)
    assert (found["f1"].value, found["answerable_f1"].value) == (0.375, 0.5)
    assert (found["answerable_f1"].low, found["answerable_f1"].high) == (0.25, 0.75)


def test_folds_need_not_all_have_an_area() -> None:
    judged = [{"pseudo_values": {"auroc": 0.5}}, {"scores": {}}, {"pseudo_values": {"auroc": 0.7}}]
    assert intervals(judged)["auroc"].value == pytest.approx(0.6)


def test_the_worst_are_wrong_and_sure_of_it() -> None:
    judged = [
        {"line": line, "confidence": sure, "badness": wrong}
        for line, sure, wrong in ((1, 0.9, 0.0), (2, 0.6, 1.0), (3, 0.99, 1.0), (4, 0.5, 0.0), (5, 0.1, 3.0))
    ]
    assert [each["line"] for each in worst(judged, 5)] == [5, 3, 2]
    assert [each["line"] for each in worst(judged, 1)] == [5]
    numbers = number_scores(np.array([0.0, 0, 0]), np.array([0.5, -9, 0]))["judged"]
    assert [each["predicted"] for each in worst(numbers, 3)] == [-9.0, 0.5]
