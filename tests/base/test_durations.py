"""Spans of time, as people and as SLURM write them."""

import pytest

from dstrain.base import durations


def test_spans_for_people() -> None:
    assert durations.clock(80) == "0:01:20"
    assert durations.clock(2 * 86_400 + 3 * 3_600) == "2 d 3:00:00"
    assert [durations.rounded(seconds) for seconds in (-1, 12.4, 180, 5 * 3_600, 8 * 86_400)] == [
        *("0 s", "12 s", "3 min", "5 h", "8 d")
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7:03", 423), ("1:00:00", 3_600), ("2-00:00:01\n", 172_801), ("UNLIMITED", None), ("INVALID", None)],
)
def test_what_squeue_says_is_left(text: str, seconds: int | None) -> None:
    assert durations.parse_slurm_left(text) == seconds


def test_a_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'soon' is no time limit"):
        durations.parse_slurm_limit("soon")
