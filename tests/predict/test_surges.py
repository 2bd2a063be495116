"""Surges of negatives: exact windows, one alert for each surge, and none where nothing changes."""

import random
from collections.abc import Iterator

import pytest

from dstrain.predict.surges import EVERYTHING, Change, Message, Rule, changes, surge_p

RULE = Rule(window_seconds=60, baseline_seconds=600, least=5, begin=1e-3, end=0.05)


def steady(shares: list[tuple[int, float]], seed: int = 0, topic: str = "x", every: float = 6.0) -> Iterator[Message]:
    """Messages `every` so many seconds; of each stretch (seconds, share of negatives)."""
    draw, now = random.Random(seed), 0.0
    for seconds, share in shares:
        end = now + seconds
        while now < end:
            yield Message(now, (topic,), draw.random() < share, f"at {now:g}")
            now += every


def of(topic: str, found: Iterator[Change]) -> list[Change]:
    return [change for change in found if change.topic == topic]


def test_the_p_is_that_of_fishers_exact_test() -> None:
    from scipy.stats import fisher_exact

    for counts in [(5, 10, 3, 100), (10, 10, 0, 50), (1, 20, 10, 100), (0, 5, 0, 5)]:
        negatives, messages, before, messages_before = counts
        table = [[negatives, messages - negatives], [before, messages_before - before]]
        assert surge_p(*counts) == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


def test_a_surge_alerts_once_and_is_over_once() -> None:
    found = of("x", changes(steady([(900, 0.1), (120, 0.9), (600, 0.1)]), RULE))
    assert [change.begins for change in found] == [True, False]
    begins, over = found
    assert 900 < begins.time < 960  # seen before the window is full of it
    assert 1020 < over.time < 1140
    assert begins.p <= RULE.begin
    assert over.p > RULE.end
    assert begins.texts[-1] == f"at {begins.time:g}"
    assert begins.messages == 10


def test_the_counts_are_those_of_the_windows() -> None:
    """Every message is counted again by hand, at each change."""
    messages = list(steady([(900, 0.2), (100, 1.0), (500, 0.1), (100, 0.9)], seed=3, every=2.5))
    found = of("x", changes(messages, RULE))
    assert len(found) >= 3
    for change in found:
        window = [m for m in messages if change.time - 60 < m.time <= change.time]
        before = [m for m in messages if change.time - 660 < m.time <= change.time - 60]
        assert (change.negatives, change.messages) == (sum(m.negative for m in window), len(window))
        assert (change.negatives_before, change.messages_before) == (sum(m.negative for m in before), len(before))
        assert change.texts == tuple(m.text for m in window if m.negative)[-3:]


@pytest.mark.slow
def test_what_stays_as_it_is_alerts_hardly_ever() -> None:
    """A hundred days of ten messages an hour, looked at after each: at 1e-4 hardly one false alert in a month."""
    rule = Rule()
    alerts = 0
    for seed in range(10):
        messages = steady([(10 * 86400, 0.15)], seed=seed, every=360.0)
        alerts += sum(change.begins for change in changes(messages, rule)) // 2  # of `x`, and the same of `all`
    assert alerts <= 4


def test_topics_are_counted_apart_and_all_messages_together() -> None:
    calm = list(steady([(900, 0.1)], seed=1, topic="calm"))
    loud = list(steady([(840, 0.1), (60, 1.0)], seed=2, topic="loud"))
    together = sorted(calm + loud, key=lambda message: message.time)
    found = list(changes(together, RULE))
    assert of("calm", iter(found)) == []
    assert [change.begins for change in of("loud", iter(found))] == [True]
    assert of(EVERYTHING, iter(found))[0].messages > of("loud", iter(found))[0].messages


def test_a_stream_that_is_too_short_says_nothing() -> None:
    messages = [Message(float(n), ("x",), True) for n in range(100)]  # all negative from the start: it is usual
    assert list(changes(messages, RULE)) == []
    assert list(changes([], RULE)) == []


def test_a_message_from_before_counts_as_of_now() -> None:
    calm = [Message(6.0 * n, (), n % 10 == 0) for n in range(100)]
    late = [Message(0.0, (), True, "late") for _ in range(10)]
    (change,) = [one for one in changes([*calm, *late], RULE) if one.begins]
    assert change.time == 594.0
    assert change.texts[-1] == "late"
