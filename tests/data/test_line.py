"""The order of one corpus: every epoch reads each token once, for any lengths, lanes and sizes of blocks."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.counter_rng import stream_key
from dstrain.data.line import Line, Window, default_block_tokens
from dstrain.data.permutation import permute, unpermute

LINES = st.builds(
    lambda tokens, lanes, block, window: Line(tokens, lanes, (7, "train", "corpus"), block, window),
    st.integers(1, 400),
    st.integers(1, 13),
    st.integers(1, 50),
    st.integers(1, 6),
)


def windows(line: Line, lane: int, epoch: int) -> Iterator[Window]:
    """All windows of a lane in an epoch, in turn."""
    position, end = line.epoch_start(lane, epoch), line.epoch_start(lane, epoch + 1)
    while position < end:
        window = line.window_at(lane, position)
        assert window.life == position and window.epoch == epoch and window.lane == lane
        yield window
        position += window.tokens
    assert position == end


@given(LINES, st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_every_epoch_reads_each_token_once(line: Line, epoch: int) -> None:
    counts = np.zeros(line.tokens, np.int64)
    for lane in range(line.lanes):
        for window in windows(line, lane, epoch):
            assert (window.ranges[:, 1] - window.ranges[:, 0]).sum() == window.tokens
            for first, last in window.ranges:
                assert 0 <= first < last <= line.tokens
                counts[first:last] += 1
    assert (counts == 1).all()


@given(LINES, st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_lanes_keep_together(line: Line, epoch: int) -> None:
    starts = [line.epoch_start(lane, epoch) for lane in range(line.lanes)]
    assert max(starts) - min(starts) <= 1
    assert sum(starts) == epoch * line.tokens
    ends = [line.epoch_start(lane, epoch + 1) for lane in range(line.lanes)]
    borders = np.cumsum([0, *np.subtract(ends, starts)]).tolist()
    assert [line.lane_range(lane, epoch) for lane in range(line.lanes)] == list(pairwise(borders))


@given(LINES, st.integers(0, 10**9), st.data())
@settings(max_examples=200, deadline=None)
def test_a_position_is_in_its_epoch(line: Line, epoch: int, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, line.lanes - 1))
    first, last = line.epoch_start(lane, epoch), line.epoch_start(lane, epoch + 1)
    for position in {first, last - 1} - {last, first - 1}:
        assert line.epoch_of(lane, position) == epoch


@given(LINES, st.integers(0, 50), st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_windows_of_finds_where_tokens_are_read(line: Line, epoch: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, line.tokens - 1))
    last = data.draw(st.integers(first + 1, line.tokens))
    reached = first
    for window, begin, stop in line.windows_of(first, last, epoch):
        assert begin == reached < stop
        assert any(low <= begin and stop <= high for low, high in window.ranges.tolist())
        again = line.window_at(window.lane, window.life)
        assert again.ranges.tolist() == window.ranges.tolist() and again.number == window.number
        reached = stop
    assert reached == last


@given(st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_permutation_and_unpermute_its_inverse(length: int, seed: int) -> None:
    places, key = np.arange(length), stream_key(seed)
    values = permute(places, length, key)
    assert np.sort(values).tolist() == places.tolist()
    assert unpermute(values, length, key).tolist() == places.tolist()


def test_two_epochs_have_little_to_do_with_each_other() -> None:
    places = [permute(np.arange(4096), 4096, stream_key(1, epoch)) for epoch in range(8)]
    correlations = np.asarray(np.corrcoef(np.array(places)))[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 0.06


def test_blocks_cut_few_documents() -> None:
    for documents, mean in ((100_000, 20), (40_040, 60), (1_000_000, 700), (20_000, 4000)):
        blocks = -(-documents * mean // default_block_tokens(documents * mean, documents))
        assert blocks / documents < 0.01


def test_the_order_is_pinned() -> None:
    """A change here is another law: old runs could not be resumed."""
    line = Line(1000, 4, (1, "train", "corpus"), 64, 2)
    assert [line.window_at(lane, 300).ranges.tolist() for lane in range(4)] == PINNED


PINNED = [[[384, 448], [512, 576]], [[832, 896], [64, 128]], [[256, 320], [576, 640]], [[960, 1000], [640, 704]]]
