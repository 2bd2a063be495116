"""Shares of rows: exact over batches, stretches of steps and lanes; counts as a closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.mixture import CIRCLE_POINTS, Mixture

ROWS = 600
WEIGHTS = st.lists(st.integers(0, 1000), min_size=2, max_size=5).filter(lambda weights: sum(weights) > 0)
LANES = st.sampled_from([1, 2, 3, 5, 8, 24, 64, 100, 256])


def drawn_sources(mixture: Mixture, lanes: int) -> np.ndarray:
    """(rows of a lane, lanes)."""
    return mixture.sources(np.arange(lanes)[None], np.arange(ROWS)[:, None])


@given(WEIGHTS, LANES)
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_shares_are_exact_over_batches_stretches_and_lanes(weights: list[int], lanes: int) -> None:
    """Measured over 1,400 mixtures of two to five sources: a row for two sources, and 3.6 at most for more."""
    drawn = drawn_sources(Mixture(weights, lanes), lanes)
    most = 1 + 1e-6 if np.count_nonzero(weights) == 2 else 4
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        is_source = drawn == source
        of_batches = is_source.sum(axis=1) - lanes * share
        assert np.abs(of_batches).max() <= 1 + 1e-6
        for ahead in (np.cumsum(of_batches), *np.cumsum(is_source - share, axis=0).T):
            assert max(ahead.max(), 0) - min(ahead.min(), 0) <= most + 0.5, "rows of a stretch"
            assert np.abs(ahead).max() <= most


@given(WEIGHTS, LANES, st.integers(0, ROWS))
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_rows_before_counts_what_sources_gives(weights: list[int], lanes: int, rows: int) -> None:
    mixture = Mixture(weights, lanes)
    drawn = drawn_sources(mixture, lanes)[:rows]
    for source in range(len(weights)):
        counted = mixture.rows_before(source, np.arange(lanes), np.array([rows]))
        assert counted.tolist() == (drawn == source).sum(axis=0).tolist()


@given(WEIGHTS, LANES, st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_row_of_inverts_rows_before(weights: list[int], lanes: int, data: st.DataObject) -> None:
    mixture = Mixture(weights, lanes)
    source = data.draw(st.sampled_from([number for number, weight in enumerate(weights) if weight > 0]))
    lane, number = data.draw(st.integers(0, lanes - 1)), data.draw(st.integers(0, 10**6))
    row = mixture.row_of(source, lane, number)
    assert mixture.sources(np.array([lane]), np.array([row])).tolist() == [source]
    assert mixture.rows_before(source, np.array([lane]), np.array([row])).tolist() == [number]


def test_one_source_has_every_row() -> None:
    mixture = Mixture([0.0, 2.5, 0.0], 8)
    assert np.unique(drawn_sources(mixture, 8)).tolist() == [1]
    assert mixture.rows_before(1, np.arange(8), np.array([10**9])).tolist() == [10**9] * 8
    assert mixture.row_of(1, 3, 77) == 77


def test_a_far_row_is_counted_as_exactly_as_a_near_one() -> None:
    mixture, rows = Mixture([0.7, 0.25, 0.05], 64), np.array([1_000_000_007])
    counts = [mixture.rows_before(source, np.arange(64), rows) for source in range(3)]
    assert np.sum(counts, axis=0).tolist() == [1_000_000_007] * 64
    assert counts[1] == pytest.approx(0.25 * 1_000_000_007, abs=16)


def test_the_order_is_pinned() -> None:
    """A change here is another law: old runs could not be resumed."""
    mixture = Mixture([0.7, 0.25, 0.05], 4)
    drawn = mixture.sources(np.arange(4)[None], np.arange(6)[:, None]).tolist()
    assert drawn == PINNED


PINNED = [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("lanes", [1, 3, 64, 1024])
@pytest.mark.parametrize("first", [0, CIRCLE_POINTS - 20, 8 * 10**9])
@pytest.mark.slow
def test_counts_go_on_after_a_lane_has_been_round_the_circle(lanes: int, first: int) -> None:
    mixture = Mixture((0.7, 0.2, 0.1), lanes)
    some_lanes, rows = np.array([0, lanes - 1]), np.arange(first, first + 40)
    sources = mixture.sources(some_lanes[:, None], rows)
    for source in range(3):
        before, after = (mixture.rows_before(source, some_lanes, np.array(row)) for row in (first, first + 40))
        assert (after - before).tolist() == (sources == source).sum(axis=1).tolist()
    for lane, of_lane in zip(some_lanes.tolist(), sources.tolist(), strict=True):
        number = int(mixture.rows_before(of_lane[7], np.array([lane]), rows[7:8])[0])
        assert mixture.row_of(of_lane[7], lane, number) == first + 7
