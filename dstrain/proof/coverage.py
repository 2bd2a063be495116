"""How often each token of a corpus was read: arithmetic over its lanes, whatever the corpus' size.

An epoch reads every token once, so of an epoch that all lanes have finished nothing needs to be looked up. Of the one
that is under way it is enough to know how far each lane is. Only two things are looked up, document by document: what
some lanes have read of an epoch that others have not come to yet (for a few steps at the end of each), and what lies
in batches that were passed over.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dstrain.data.lanes import SourceLanes

Int64Array = NDArray[np.int64]
MOST_PIECES = 200_000  # of documents that are looked up one by one
MOST_WINDOW_TOKENS = 1 << 31  # that are looked through for where documents begin


@dataclass(frozen=True)
class Ranges:
    """Ranges of a corpus' line: tokens `firsts[i]` … `lasts[i]` - 1."""

    firsts: Int64Array
    lasts: Int64Array

    @property
    def tokens(self) -> int:
        """In all of them."""
        return int((self.lasts - self.firsts).sum())

    @classmethod
    def join(cls, parts: Iterable["Ranges"]) -> "Ranges":
        """All ranges of several, in order."""
        parts = list(parts)
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        return cls(np.concatenate([part.firsts for part in parts]), np.concatenate([part.lasts for part in parts]))


def line_ranges(lanes: SourceLanes, lane: int, first: int, last: int) -> Ranges:
    """The tokens of a corpus' line at positions `first` … `last` - 1 of a lane's life, in reading order.

    Raises:
        CorpusError: a shard cannot be read.
    """
    parts = []
    while first < last:
        window = lanes.line.window_at(lane, first)
        slices, firsts = lanes.window_slices(window)
        ends = window.life + np.cumsum(slices.length)
        begins = np.maximum(ends - slices.length, first)
        stops = np.minimum(ends, last)
        inside = begins < stops
        starts = firsts + begins - (ends - slices.length)
        parts.append(Ranges(starts[inside], (starts + stops - begins)[inside]))
        first = window.life + window.tokens
    return Ranges.join(parts)


def times_read(lanes: SourceLanes, read: Int64Array) -> tuple[Counter[int], bool]:
    """How many tokens of a corpus were read how often.

    Args:
        lanes: of the corpus.
        read: (lanes,), how many tokens each lane has read since the beginning.

    Returns:
        Number of times → number of tokens, without zeros; and whether that is exact. It is not where lanes of an
        enormous corpus stand on both sides of an epoch's end: then all tokens that were read of the later epoch are
        taken to have been read in the earlier one too, as nearly all are.

    Raises:
        CorpusError: a shard cannot be read.
    """
    line, positions = lanes.line, read.tolist()
    epochs = [line.epoch_of(lane, position) for lane, position in enumerate(positions)]
    lowest, highest = min(epochs), max(epochs)
    if lowest == highest:
        begun = sum(position - line.epoch_start(lane, lowest) for lane, position in enumerate(positions))
        return +Counter({lowest: line.tokens - begun, lowest + 1: begun}), True
    ends = [line.epoch_start(lane, highest) for lane in range(len(positions))]
    counts: Counter[int] = Counter({highest: line.tokens})
    if len(positions) * line.window_blocks * line.block_tokens > MOST_WINDOW_TOKENS:
        early = sum(max(0, position - end) for position, end in zip(positions, ends, strict=True))
        late = sum(max(0, end - position) for position, end in zip(positions, ends, strict=True))
        return +Counter({highest - 1: late, highest: line.tokens - late - early, highest + 1: early}), False
    missing = [line_ranges(lanes, lane, positions[lane], end) for lane, end in enumerate(ends)]
    ahead = [line_ranges(lanes, lane, end, positions[lane]) for lane, end in enumerate(ends)]
    for tokens, (more, fewer) in _overlaps(Ranges.join(ahead), Ranges.join(missing)):
        counts[highest] -= tokens
        counts[highest + more - fewer] += tokens
    return +counts, True


def without(counts: Counter[int], lanes: SourceLanes, read: Int64Array, dropped: Ranges) -> Counter[int] | None:
    """The same less what was read of some ranges, once for each time that they are named; None if they are too many.

    Args:
        counts: of `times_read`.
        lanes: of the corpus.
        read: as there.
        dropped: ranges that were read, and do not count.
    """
    if len(dropped.firsts) > MOST_PIECES:
        return None
    line = lanes.line
    epochs = [line.epoch_of(lane, position) for lane, position in enumerate(read.tolist())]
    begun = range(min(epochs), max(epochs) + 1)
    read_again = [
        part
        for first, last in _disjoint(dropped)
        for epoch in begun
        for part in _read_of(lanes, read, first, last, epoch)
    ]
    again = Ranges(*np.array(read_again, np.int64).reshape(-1, 2).T)
    left = Counter(counts)
    for tokens, (times, since) in _overlaps(dropped, again):
        left[begun[0] + since] -= tokens
        left[begun[0] + since - times] += tokens
    return +left


def _read_of(lanes: SourceLanes, read: Int64Array, first: int, last: int, epoch: int) -> Iterator[tuple[int, int]]:
    """Which of tokens `first` … `last` - 1 of the line were read in an epoch that is under way."""
    for window, begin, stop in lanes.line.windows_of(first, last, epoch):
        until = int(read[window.lane])
        if window.life + window.tokens <= until:
            yield begin, stop
        elif window.life < until:
            slices, firsts = lanes.window_slices(window)
            ends = window.life + np.cumsum(slices.length)
            lows = np.maximum(firsts, begin)
            highs = np.minimum(np.minimum(firsts + slices.length, stop), firsts + until - (ends - slices.length))
            for index in np.flatnonzero(lows < highs).tolist():
                yield int(lows[index]), int(highs[index])


def _overlaps(first: Ranges, second: Ranges) -> Iterator[tuple[int, tuple[int, int]]]:
    """Stretches of the line that are in any of the ranges: their tokens, and in how many of either they are."""
    places = np.concatenate([first.firsts, first.lasts, second.firsts, second.lasts])
    repeats = [len(first.firsts), len(first.lasts), len(second.firsts), len(second.lasts)]
    changes = np.repeat([[1, 0], [-1, 0], [0, 1], [0, -1]], repeats, axis=0)
    order = np.argsort(places, kind="stable")
    inside = np.cumsum(changes[order], axis=0)[:-1]
    tokens = np.diff(places[order])
    for count, (in_first, in_second) in zip(tokens.tolist(), inside.tolist(), strict=True):
        if count and (in_first or in_second):
            yield count, (in_first, in_second)


def _disjoint(ranges: Ranges) -> list[tuple[int, int]]:
    """The same tokens in ranges that do not overlap, in natural order."""
    places = np.unique(np.concatenate([ranges.firsts, ranges.lasts]))
    begun = np.searchsorted(np.sort(ranges.firsts), places, "right")
    ended = np.searchsorted(np.sort(ranges.lasts), places, "right")
    inside = (begun > ended)[:-1]
    return list(zip(places[:-1][inside].tolist(), places[1:][inside].tolist(), strict=True))
