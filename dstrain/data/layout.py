"""Which rows make up a data step, and which tokens a row: a closed form of the step, for any rank of any world.

    step ─► phase ─► row r of the step belongs to lane r mod lanes; rank k of W owns the lanes l with l mod W = k
                     row q of the lane in this phase ─► source (mixture.py) and how many rows of it came before
                     ─► position in the life of the source's lane (line.py) ─► slices of documents (lanes.py)

All that a phase needs of those before it is how many tokens of each source each lane has read until then.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dstrain.data.lanes import SourceLanes
from dstrain.data.mixture import Mixture
from dstrain.data.spec import PhaseSpec, StreamSpec

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class PhaseLayout:
    """A phase with what came before it.

    `first_row` is the number of its first row, `tokens_before` (sources, lanes) what lanes have read of the sources.
    """

    number: int
    spec: PhaseSpec
    mixture: Mixture
    lanes: int
    first_row: int
    tokens_before: Int64Array

    @property
    def lane_rows(self) -> int:
        """Rows of a lane in a step."""
        return self.spec.global_batch_rows // self.lanes

    def first_row_of(self, step: int) -> int:
        """The number of the first row of a data step."""
        return self.first_row + (step - self.spec.first_step) * self.spec.global_batch_rows

    def tokens_until(self, step: int) -> Int64Array:
        """(sources, lanes): what the lanes have read of the sources before a data step of the phase."""
        rows = np.array((step - self.spec.first_step) * self.lane_rows)
        lanes = np.arange(self.lanes)
        counts = [self.mixture.rows_before(source, lanes, rows) for source in range(len(self.spec.weights))]
        return self.tokens_before + np.array(counts) * self.spec.sequence_length


@dataclass(frozen=True)
class RowPlaces:
    """Rows of a step, lane by lane: columns (lanes, rows of a lane).

    `positions` are where the rows begin in the lives of their sources' lanes.
    """

    phase: PhaseLayout
    step: int
    lanes: Int64Array  # (lanes,)
    row_numbers: Int64Array
    sources: Int64Array
    positions: Int64Array

    def reordered(self, order: Int64Array) -> Self:
        """The same with each lane's rows in another order, (lanes, rows of a lane)."""
        columns = (self.row_numbers, self.sources, self.positions)
        row_numbers, sources, positions = (np.take_along_axis(column, order, 1) for column in columns)
        return replace(self, row_numbers=row_numbers, sources=sources, positions=positions)


@dataclass(frozen=True)
class RowSpan:
    """Tokens `first_token` … of a row that are some of a document that was looked for."""

    step: int  # data step
    row: int  # number of the row in the run
    lane: int
    phase: int
    first_token: int
    tokens: int
    line: int  # where they begin in the corpus' line


class Layout:
    """The layout of all rows of a stream.

    Args:
        spec: the stream.
    """

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        tokens = np.zeros((len(spec.sources), spec.lanes), np.int64)
        first_row = spec.first_row
        self.phases: list[PhaseLayout] = []
        for number, phase in enumerate(spec.phases):
            assert phase.global_batch_rows % spec.lanes == 0, f"{spec.lanes} lanes, {phase.global_batch_rows} rows"
            mixture = Mixture(phase.weights, spec.lanes)
            layout = PhaseLayout(number, phase, mixture, spec.lanes, first_row, tokens)
            self.phases.append(layout)
            if number + 1 < len(spec.phases):
                next_step = spec.phases[number + 1].first_step
                tokens, first_row = layout.tokens_until(next_step), layout.first_row_of(next_step)

    def phase_at(self, step: int) -> PhaseLayout:
        """The phase of a data step; the last one goes on without end."""
        assert step >= self.spec.first_step, f"data step {step} is before this stream's first, {self.spec.first_step}"
        return next(phase for phase in reversed(self.phases) if phase.spec.first_step <= step)

    def own_lanes(self, rank: int, world: int) -> Int64Array:
        """The lanes that a rank reads."""
        assert 0 <= rank < world <= self.spec.lanes, f"rank {rank} of {world} with {self.spec.lanes} lanes"
        return np.arange(rank, self.spec.lanes, world)

    def places(self, step: int, lanes: Int64Array) -> RowPlaces:
        """Where the rows of some lanes lie in a data step."""
        phase = self.phase_at(step)
        return self._places(phase, step, lanes, self._rows_before(phase, step, lanes))

    def walk(self, lanes: Int64Array, step: int) -> Iterator[RowPlaces]:
        """`places` of one data step after another, without end: counts go on where the last step ended."""
        counts, counted = None, None
        while True:
            phase = self.phase_at(step)
            if counts is None or phase is not counted:
                counts, counted = self._rows_before(phase, step, lanes), phase
            places = self._places(phase, step, lanes, counts)
            yield places
            for source in range(len(self.spec.sources)):
                counts[source] += (places.sources == source).sum(axis=1)
            step += 1

    def _rows_before(self, phase: PhaseLayout, step: int, lanes: Int64Array) -> Int64Array:
        """(sources, lanes): rows of each source that lanes have had in this phase before a step."""
        rows = np.array((step - phase.spec.first_step) * phase.lane_rows)
        return np.array(
            [phase.mixture.rows_before(source, lanes, rows) for source in range(len(self.spec.sources))]
        ).reshape(len(self.spec.sources), len(lanes))

    def _places(self, phase: PhaseLayout, step: int, lanes: Int64Array, counts: Int64Array) -> RowPlaces:
        count, length = phase.lane_rows, phase.spec.sequence_length
        turns = np.arange(count)
        row_numbers = phase.first_row_of(step) + turns * self.spec.lanes + lanes[:, None]
        sources = phase.mixture.sources(lanes[:, None], (step - phase.spec.first_step) * count + turns)
        before = np.empty_like(sources)
        for source in range(len(self.spec.sources)):
            is_source = sources == source
            earlier = np.cumsum(is_source, axis=1) - is_source
            before = np.where(is_source, counts[source][:, None] + earlier, before)
        tokens_before = phase.tokens_before[sources, lanes[:, None]]
        return RowPlaces(phase, step, lanes, row_numbers, sources, tokens_before + before * length)

    def source_tokens(self, step: int) -> Int64Array:
        """(sources,): tokens of each source in all rows before a data step."""
        tokens: Int64Array = self.tokens_read(step).sum(axis=1)
        return tokens

    def tokens_read(self, step: int) -> Int64Array:
        """(sources, lanes): what the lanes have read of the sources before a data step."""
        return self.phase_at(step).tokens_until(step)

    # ------------------------------------------------------------ the way back

    def find(self, source: int, lanes: SourceLanes, first: int, last: int, steps: int) -> Iterator[RowSpan]:
        """Every row before data step `steps` that holds some of tokens `first` … `last` - 1 of a source's line.

        Args:
            source: its number.
            lanes: of this source.
            first: where the tokens begin in the corpus' line.
            last: where they end.
            steps: how far to look.

        Yields:
            What of them is in a row, in the order of the line; epoch after epoch.
        """
        line, end = lanes.line, max(steps, self.spec.first_step)
        read = self.phase_at(end).tokens_until(end)[source].tolist()  # of each lane's life
        last_epochs = (line.epoch_of(lane, tokens - 1) for lane, tokens in enumerate(read) if tokens)
        epochs = 1 + max(last_epochs, default=-1)
        for epoch in range(epochs):
            for window, begin, stop in line.windows_of(first, last, epoch):
                slices, firsts = lanes.window_slices(window)
                ends = np.cumsum(slices.length)
                for index in np.flatnonzero((firsts < stop) & (firsts + slices.length > begin)).tolist():
                    low, high = max(begin, int(firsts[index])), min(stop, int(firsts[index] + slices.length[index]))
                    position = window.life + int(ends[index] - slices.length[index]) + low - int(firsts[index])
                    yield from self._spans(source, window.lane, position, low, high - low, steps)

    def _spans(self, source: int, lane: int, position: int, line: int, tokens: int, steps: int) -> Iterator[RowSpan]:
        """The rows that hold `tokens` tokens from a position of the life of a source's lane on."""
        while tokens:
            phase = next(phase for phase in reversed(self.phases) if phase.tokens_before[source, lane] <= position)
            length = phase.spec.sequence_length
            number, offset = divmod(position - int(phase.tokens_before[source, lane]), length)
            if not phase.spec.weights[source]:
                return  # a source that ended: no row will ever hold it
            row = phase.mixture.row_of(source, lane, number)
            turn_step, turn = divmod(row, phase.lane_rows)
            step = phase.spec.first_step + turn_step
            if step >= steps:
                return
            taken = min(length - offset, tokens)
            row_number = phase.first_row_of(step) + turn * self.spec.lanes + lane
            yield RowSpan(step, row_number, lane, phase.number, offset, taken, line)
            position, line, tokens = position + taken, line + taken, tokens - taken
