"""Which source each row of a phase is of: a closed form of (row of a lane, lane), with no table and no state.

Picture a circle of `C` points, cut into one arc for each source, as long as its weight. The lanes stand on it at equal
distances and all take the same stride from row to row:

    row q of lane l lies at (q · stride + l · C / lanes) mod C; the arc that this point is in is the row's source

- *A batch* is lanes at equal distances, once for each row that a lane has in it: every arc holds its share of them, to
  less than one row at each of its two ends.
- *A lane* walks round the circle by `stride`, and *a stretch of steps* by `stride` modulo the distance of two lanes.
  Both are rotations, which are spread as evenly as can be for strides that are no near-fractions of the circle
  (Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods", 1992, section 3.1). The stride is searched
  for so that both are, for the weights at hand. Of two sources, each is less than a row ahead or behind, over any
  stretch of steps and in any lane; of three to ten, mostly less than three rows and always less than five.

How many of a lane's first q rows are of one source is a sum of floor((a·i + b) / m) over i < q, which Euclid's
algorithm gives in a logarithm of steps. So the row at step 10⁹ costs what the first one does.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, combinations

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import draws, stream_key

Int64Array = NDArray[np.int64]

CIRCLE_POINTS = 1 << 31  # at most: products of a point and a row then fit 63 bits
STRIDES_DRAWN = 2048
MOST_STRIDES_OF_AN_ARC = 8
BATCH_ROUNDS = ((128, 512), (1024, 48))  # rows over which candidates are compared, and how many of them stay
LANE_ROUNDS = ((128, 2, 256), (512, 8, 32), (4096, 16, 1))  # the same with so many of the lanes


class Mixture:
    """The sources of a phase's rows.

    Args:
        weights: of the sources, not negative, in any unit.
        lanes: number of lanes.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        total = sum(map(Fraction, weights))
        assert total > 0, "a mixture without weight"
        self._spacing = _prime_below(CIRCLE_POINTS // lanes)  # between two lanes
        self._circle = self._spacing * lanes
        shares = accumulate(Fraction(weight) / total for weight in weights)
        ends = tuple(int(share * self._circle + Fraction(1, 2)) for share in shares)
        self._ends = np.array(ends, np.int64)  # of the arcs
        self._stride = _stride(ends, lanes, self._spacing)

    def sources(self, lanes: Int64Array, rows: Int64Array) -> Int64Array:
        """The source of rows of lanes; the arguments broadcast against each other."""
        if self._stride == 0:
            return np.full(np.broadcast_shapes(np.shape(lanes), np.shape(rows)), np.argmax(self._ends > 0), np.int64)
        points = (rows % self._circle * self._stride % self._circle + lanes * self._spacing) % self._circle
        return np.searchsorted(self._ends, points, "right").astype(np.int64)

    def rows_before(self, source: int, lanes: Int64Array, rows: Int64Array) -> Int64Array:
        """How many of the first `rows` rows of lanes are of a source; `lanes` and `rows` broadcast."""
        lanes, rows = np.broadcast_arrays(np.asarray(lanes, np.int64), np.asarray(rows, np.int64))
        before = self._rows_below(int(self._ends[source]), lanes, rows)
        return before - self._rows_below(int(self._ends[source - 1]), lanes, rows) if source else before

    def row_of(self, source: int, lane: int, number: int) -> int:
        """Which row of a lane is row `number` of a source there, both from 0: the inverse of `rows_before`."""
        share = (int(self._ends[source]) - (int(self._ends[source - 1]) if source else 0)) / self._circle
        assert share > 0, "a source without rows"
        # A turn has as many rows of a source as its arc has points, to within one for each lane.
        slack = 8 + int(number / share) // self._circle * (self._circle // self._spacing)
        low, high = max(0, int((number - slack) / share)), int((number + slack + 1) / share) + 1
        lane_array = np.array([lane])
        while high - low > 1:  # rows_before(low) ≤ number < rows_before(high)
            middle = (low + high) // 2
            if int(self.rows_before(source, lane_array, np.array([middle]))[0]) <= number:
                low = middle
            else:
                high = middle
        return low

    def _rows_below(self, end: int, lanes: Int64Array, rows: Int64Array) -> Int64Array:
        """How many of the first `rows` rows lie on the points 0 … end - 1."""
        if end == 0 or end == self._circle or self._stride == 0:
            return rows * int(end > 0)
        turns, rest = np.divmod(rows, self._circle)  # after as many rows as points, a lane stands where it began
        below = self._rest_below(end, lanes, rest)
        if turns.any():
            below += turns * self._rest_below(end, lanes, np.full_like(rest, self._circle))
        return below

    def _rest_below(self, end: int, lanes: Int64Array, rows: Int64Array) -> Int64Array:
        """The same for no more than one turn: larger numbers do not fit 63 bits."""
        starts = lanes * self._spacing
        circle, stride = self._circle, self._stride
        # A point y is below `end` exactly if floor(y / circle) - floor((y - end) / circle) is 1, else that is 0.
        return (
            _sums_of_floors(rows, circle, stride, starts)
            - _sums_of_floors(rows, circle, stride, starts + (circle - end))
            + rows
        )


@lru_cache(maxsize=256)
def _stride(ends: tuple[int, ...], lanes: int, spacing: int) -> int:
    """The stride of the rotations, of a lane and of a batch, that miss the shares least. 0 where there is one source.

    Candidates are compared over few rows, and those that do best over more. They are drawn, but for the fractions of
    an arc: an arc that is a few strides long is hit with an error that never grows (Kesten, "On a conjecture of Erdős
    and Szüsz", 1966). Of two sources, one stride to an arc is never off by a row.
    """
    circle = lanes * spacing
    arcs = [(start, end) for start, end in zip((0, *ends), ends, strict=False) if start < end]
    if len(arcs) == 1:
        return 0
    if len(arcs) == 2:
        return arcs[0][1]
    of_batches = 1 + _drawn("batches", lanes, spacing - 1) if spacing > 1 else np.ones(1, np.int64)
    for rows, kept in BATCH_ROUNDS:
        of_batches = _best(of_batches, _batch_error(of_batches, arcs, lanes, spacing, rows), kept)
    strides = np.resize(of_batches, STRIDES_DRAWN) + _drawn("turns", lanes, lanes) * spacing
    fractions = {
        ((end - start) + turn * circle) // parts % circle
        for (start, _), (end, _) in combinations(arcs, 2)
        for parts in range(1, MOST_STRIDES_OF_AN_ARC + 1)
        for turn in range(parts)
    }
    strides = np.concatenate([np.unique(strides), np.array(sorted(fractions - {0})[:STRIDES_DRAWN], np.int64)])
    for rows, some_lanes, kept in LANE_ROUNDS:
        error = np.maximum(
            _batch_error(strides, arcs, lanes, spacing, rows),
            _lane_error(strides, arcs, lanes, spacing, rows, some_lanes),
        )
        strides = _best(strides, error, kept)
    return int(strides[0])


def _drawn(purpose: str, lanes: int, below: int) -> Int64Array:
    """(STRIDES_DRAWN,) numbers from 0 to `below` - 1."""
    numbers = draws(stream_key(purpose, lanes), np.arange(STRIDES_DRAWN, dtype=np.uint64))
    return (numbers % np.uint64(below)).astype(np.int64)


def _best(strides: Int64Array, errors: Int64Array, kept: int) -> Int64Array:
    return strides[np.argsort(errors, kind="stable")[:kept]]


def _batch_error(strides: Int64Array, arcs: list[tuple[int, int]], lanes: int, spacing: int, rows: int) -> Int64Array:
    """(strides,): the most that any stretch of batches misses an arc's share by, in points × rows."""
    firsts = np.arange(rows) * (strides[:, None] % spacing) % spacing  # (strides, rows): of the lanes, on the circle
    worst = np.zeros(len(strides), np.int64)
    for start, end in arcs:
        counts = -(-(end - start - (firsts - start) % spacing) // spacing)
        worst = np.maximum(worst, _range_of_sums(counts * (lanes * spacing) - (end - start) * lanes))
    return worst


def _lane_error(
    strides: Int64Array, arcs: list[tuple[int, int]], lanes: int, spacing: int, rows: int, some_lanes: int
) -> Int64Array:
    """(strides,): the same of any stretch of rows of some lanes."""
    circle = lanes * spacing
    starts = np.arange(0, lanes, -(-lanes // some_lanes)) * spacing
    points = (np.arange(rows) * strides[:, None] % circle)[:, None, :] + starts[:, None]  # (strides, lanes, rows)
    points -= circle * (points >= circle)
    worst = np.zeros(len(strides), np.int64)
    for start, end in arcs:
        is_source = (points >= start) & (points < end)
        worst = np.maximum(worst, _range_of_sums(is_source * circle - (end - start)).max(axis=-1))
    return worst


def _range_of_sums(terms: Int64Array) -> Int64Array:
    """(…, n) → (…,): the largest absolute sum of terms that follow each other."""
    sums = np.cumsum(terms, axis=-1)
    return np.asarray(np.maximum(sums.max(axis=-1), 0) - np.minimum(sums.min(axis=-1), 0))


def _sums_of_floors(counts: Int64Array, modulus: int, factor: int, offsets: Int64Array) -> Int64Array:
    """The sum of floor((factor · i + offset) / modulus) over 0 ≤ i < count, for each pair of count and offset.

    All arguments are at least 0. This is Euclid's algorithm: in each round the sum is turned into one over the other
    axis of the same lattice, with a smaller modulus (see AtCoder Library, `floor_sum`).
    """
    total = np.zeros(counts.shape, np.int64)
    count, offset = counts.copy(), offsets.copy()
    while True:
        total += (count - 1) * count // 2 * (factor // modulus)
        factor %= modulus
        total += count * (offset // modulus)
        offset %= modulus
        top = factor * count + offset
        count, offset = top // modulus, top % modulus
        if not count.any():
            return total
        modulus, factor = factor, modulus


def _prime_below(number: int) -> int:
    """The largest prime below a number; 1 where there is none."""
    for candidate in range(number - 1, 1, -1):
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            return candidate
    return 1
