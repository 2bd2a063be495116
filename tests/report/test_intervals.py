"""Bootstrap intervals, calibration and the worst examples, against what is known of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.report.intervals import calibration, intervals, worst


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    judged = [{"scores": {"accuracy": float(number < 300)}} for number in range(400)]
    found = intervals(judged)["accuracy"]
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - spread, abs=0.01)
    assert found.high == pytest.approx(0.75 + spread, abs=0.01)
    assert intervals(judged) == {"accuracy": found}  # the same at each time


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=60))
def test_macro_f1_is_scikit_learns_and_lies_in_its_interval(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    judged = [{"label": true, "predicted": said, "scores": {"accuracy": float(true == said)}} for true, said in pairs]
    found = intervals(judged)
    true, said = zip(*pairs, strict=True)
    assert found["macro_f1"].value == pytest.approx(f1_score(true, said, average="macro", zero_division=0.0))
    assert found["accuracy"].value == pytest.approx(np.mean([t == s for t, s in pairs]))
    for interval in found.values():
        assert 0.0 <= interval.low <= interval.high <= 1.0


def test_counts_are_added_up_before_they_become_f1() -> None:
    judged = [{"counts": {"entity_f1": counts}} for counts in ([1, 2, 1], [0, 0, 0], [3, 3, 5], [0, 1, 0])]
    assert intervals(judged)["entity_f1"].value == pytest.approx(2 * 4 / (6 + 6))
    assert [each["counts"]["entity_f1"] for each in worst(judged, 9)] == [[0, 1, 0], [1, 2, 1], [3, 3, 5]]


def test_calibration_compares_confidence_with_accuracy_in_each_bin() -> None:
    judged = [{"confidence": 0.95, "scores": {"accuracy": float(n < 80)}} for n in range(100)]
    judged += [{"confidence": 0.55, "scores": {"accuracy": float(n < 55)}} for n in range(100)]
    judged += [{"confidence": 1.0, "scores": {"accuracy": 1.0}}]
    bins, error = calibration(judged)
    assert [(each.examples, round(each.accuracy, 2)) for each in bins] == [(100, 0.55), (101, 0.80)]
    assert error == pytest.approx((100 * 0.0 + 101 * abs((95 + 1) / 101 - 81 / 101)) / 201, abs=1e-9)


def test_the_worst_are_wrong_and_sure_of_it() -> None:
    judged = [
        {"line": line, "confidence": sure, "scores": {"accuracy": right}}
        for line, sure, right in ((1, 0.9, 1.0), (2, 0.6, 0.0), (3, 0.99, 0.0), (4, 0.5, 1.0))
    ]
    assert [each["line"] for each in worst(judged, 5)] == [3, 2]
    assert intervals([]) == {}
