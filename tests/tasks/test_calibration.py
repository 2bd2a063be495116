"""Bins of like confidence, against sums done by hand; and what each task calls a prediction."""

import numpy as np
import pytest

from dstrain.tasks.answer_scores import Judged, answer_scores, confidence
from dstrain.tasks.calibration import CalibrationBin, binned, calibration
from dstrain.tasks.scores import label_scores, label_set_scores


def test_confidence_is_compared_with_accuracy_in_each_bin() -> None:
    judged = [{"calibration": binned(0.95, n < 80)} for n in range(100)]
    judged += [{"calibration": binned(0.55, n < 55)} for n in range(100)]
    judged += [{"calibration": binned(1.0, True)}, {}]  # in the last bin; and one that predicts nothing
    bins, error = calibration(judged)
    assert [(each.predictions, round(each.accuracy, 2)) for each in bins] == [(100, 0.55), (101, 0.80)]
    assert error == pytest.approx((100 * 0.0 + 101 * abs((95 + 1) / 101 - 81 / 101)) / 201, abs=1e-9)
    assert calibration([{}]) == ([], 0.0)


def test_an_example_may_hold_many_predictions() -> None:
    words = binned([0.91, 0.99, 0.3, 0.35], [True, False, True, True])
    assert words == [[3, 2, 0.65, 2], [9, 2, 1.9, 1]]
    assert binned([np.nan, 0.5], [True, True]) == [[5, 1, 0.5, 1]], "of a model that went astray"
    bins, error = calibration(
        [{"calibration": words}, {"calibration": binned([], [])}, {"calibration": binned(0.9, True)}]
    )
    assert bins == [CalibrationBin(2, 0.325, 1.0), CalibrationBin(3, pytest.approx(2.8 / 3), pytest.approx(2 / 3))]
    assert error == pytest.approx((2 * 0.675 + 3 * (2.8 - 2) / 3) / 5)


def test_of_several_labels_each_is_a_prediction() -> None:
    logits = np.log([[9.0, 1 / 3], [4.0, 3.0]])  # probabilities 0.9, 0.25 and 0.8, 0.75
    scores = label_set_scores(["a", "b"], np.array([[1, 1], [1, 1]]), logits)
    assert [each["calibration"] for each in scores["judged"]] == [
        [[7, 1, 0.75, 0], [9, 1, 0.9, 1]],  # a, and not b, which is wrong
        [[7, 1, 0.75, 1], [8, 1, 0.8, 1]],
    ]
    (one,) = label_scores(["a", "b"], np.array([1]), np.log([[3.0, 1.0]]))["judged"]
    assert one["calibration"] == [[7, 1, one["confidence"], 0]] == [[7, 1, pytest.approx(0.75), 0]]


def test_an_answer_is_as_probable_as_all_candidates_like_it() -> None:
    candidates = [("red", np.log(4.0)), ("the Red.", np.log(2.0)), ("blue", np.log(3.0)), ("", np.log(1.0))]
    assert confidence("red", candidates, "en") == pytest.approx(6 / 10)
    assert confidence("", candidates, "en") == pytest.approx(1 / 10)
    assert confidence("", [("", -1e30)], "en") == 1.0, "no span at all"
    judged = [
        Judged("red", -1.0, ["Red"], candidates),
        Judged("blue", 3.0, [], [("blue", 0.0), ("", np.log(3.0))]),
    ]
    scores = answer_scores(judged, unanswerable=True, threshold=0.0, language="en")
    right, none = scores["judged"]
    assert (right["predicted"], right["confidence"], none["predicted"], none["confidence"]) == (
        "red",
        pytest.approx(0.6),
        "",
        pytest.approx(0.75),
    )
    assert (right["calibration"], none["calibration"]) == ([[6, 1, 0.6, 1]], [[7, 1, 0.75, 1]])
