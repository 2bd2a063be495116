"""Which source each row of a phase is of: a closed form of (row of a lane, lane), with no table and no state.

Picture a circle of `C` points, cut into one arc for each source, as long as its weight. The lanes stand on it at equal
distances and all take the same stride from row to row:

    row q of lane l lies at (q · stride + l · C / lanes) mod C; the arc that this point is in is the row's source

- *A batch* is lanes at equal distances, once for each row that a lane has in it: every arc holds its share of them, to
  less than one row at each of its two ends.
- *A lane* walks round the circle by `stride`, and *a stretch of steps* by `stride` modulo the distance of two lanes.
  Both are rotations, and a rotation by a number whose continued fraction has small partial quotients is spread as
  evenly as can be (Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods", 1992, section 3.1). The
  stride is searched for so that both are, for the weights at hand: a source is at most about three rows ahead or
  behind, from the beginning of a phase to any step, over all lanes and in each of them.

How many of a lane's first q rows are of one source is a sum of floor((a·i + b) / m) over i < q, which Euclid's
algorithm gives in a logarithm of steps. So the row at step 10⁹ costs what the first one does.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import draws, stream_key

Int64Array = NDArray[np.int64]

CIRCLE_POINTS = 1 << 31  # at most: products of a point and a row then fit 63 bits
STRIDES_DRAWN = 1 << 15
STRIDES_MEASURED = 128  # the best of those drawn, by their continued fractions
ROWS_MEASURED = 1024
LANES_MEASURED = 24


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
    """The stride whose rotations, of a lane and of a batch, miss the shares least. 0 where there is one source."""
    circle = lanes * spacing
    arcs = [(start, end) for start, end in zip((0, *ends), ends, strict=False) if start < end]
    if len(arcs) == 1:
        return 0
    drawn = draws(stream_key("stride", lanes), np.arange(STRIDES_DRAWN, dtype=np.uint64)) % np.uint64(circle)
    strides = np.maximum(drawn.astype(np.int64), 1)
    quotients = np.maximum(_quotients(strides, circle), _quotients(strides % spacing, spacing))
    best = strides[np.argsort(quotients, kind="stable")[:STRIDES_MEASURED]]
    errors = [_error(int(stride), arcs, lanes, spacing) for stride in best]
    return int(best[int(np.argmin(errors))])


def _error(stride: int, arcs: list[tuple[int, int]], lanes: int, spacing: int) -> int:
    """How far arcs get from their shares over the first steps, and over the first rows of a lane, in points × rows."""
    circle, rows = lanes * spacing, np.arange(ROWS_MEASURED, dtype=np.int64)
    points = rows * stride % circle
    some_lanes = np.arange(0, lanes, -(-lanes // LANES_MEASURED)) * spacing
    worst = 0
    for start, end in arcs:
        arc = end - start
        of_lanes = ((points + some_lanes[:, None] - start) % circle < arc).astype(np.int64)
        of_batch = -(-(arc - (points - start) % spacing) // spacing)
        for counts, share in ((of_lanes, arc), (of_batch, arc * lanes)):
            worst = max(worst, int(np.abs(np.cumsum(counts * circle - share, axis=-1)).max()))
    return worst


def _quotients(numerators: Int64Array, denominator: int) -> Int64Array:
    """How unevenly rotations by numerators ÷ denominator are spread, by the partial quotients of their fractions.

    The sum of those that runs of `ROWS_MEASURED` rows can feel, and the largest of the rest, which longer runs feel.
    """
    large, small = np.full_like(numerators, denominator), numerators.copy()
    near, far = np.zeros_like(numerators), np.zeros_like(numerators)
    previous, convergent = np.zeros_like(numerators), np.ones_like(numerators)
    while (going := small > 0).any():
        quotient = np.where(going, large // np.maximum(small, 1), 0)
        is_near = convergent < ROWS_MEASURED
        near += np.where(is_near, quotient, 0)
        far = np.maximum(far, np.where(is_near, 0, quotient))
        large, small = np.where(going, small, large), np.where(going, large - quotient * small, 0)
        # Beyond what is near, only that is known of a convergent that it stays there.
        previous, convergent = convergent, np.where(is_near, quotient * convergent + previous, convergent)
    return near + far


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
