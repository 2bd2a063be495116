"""Which rows make up a data step, and which tokens a row: a closed form of the step, for any rank of any world.

    step ─► phase ─► row r of the step belongs to lane r mod lanes; rank k of W owns the lanes l with l mod W = k
                     row q of the lane in this phase ─► source (mixture.py) and how many of its rows came before: k
                     ─► strand of the source's lane, and position in the strand's life ─► slices of documents (lanes.py)

A lane is read in a few *strands* that take turns from step to step: so a document that is longer than a row does not
go on in the very next batch. All that a phase needs of those before it is how many rows of each source each lane had.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dstrain.data.lanes import SourceLanes
from dstrain.data.mixture import Mixture
from dstrain.data.spec import PhaseSpec, StreamSpec

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class PhaseLayout:
    """A phase; `first_row` is the number of its first row."""

    number: int
    spec: PhaseSpec
    mixture: Mixture
    lanes: int
    first_row: int

    @property
    def lane_rows(self) -> int:
        """Rows of a lane in a step."""
        return self.spec.global_batch_rows // self.lanes

    def first_row_of(self, step: int) -> int:
        """The number of the first row of a data step."""
        return self.first_row + (step - self.spec.first_step) * self.spec.global_batch_rows

    def rows_before(self, source: int, lanes: Int64Array, step: int) -> Int64Array:
        """How many rows of a source lanes have in this phase before a data step, (lanes,)."""
        return self.mixture.rows_before(source, lanes, np.array((step - self.spec.first_step) * self.lane_rows))

    # A lane's rows of a source take turns over its strands in groups of `lane_rows`: all rows of a step from one.

    def strand_of(self, numbers: Int64Array, strands: int) -> tuple[Int64Array, Int64Array]:
        """Rows of a source in a lane, counted in this phase → which strand, and which row of the strand."""
        groups, rests = np.divmod(numbers, self.lane_rows)
        return groups % strands, groups // strands * self.lane_rows + rests

    def number_of(self, strand: int, row: int, strands: int) -> int:
        """The inverse of `strand_of`."""
        group, rest = divmod(row, self.lane_rows)
        return (group * strands + strand) * self.lane_rows + rest

    def strand_rows(self, numbers: Int64Array, strands: int) -> Int64Array:
        """How many of the first `numbers` (lanes,) rows of a source each strand has: (lanes, strands)."""
        groups, rests = np.divmod(numbers[:, None], self.lane_rows)
        strand = np.arange(strands)
        whole = (groups + strands - 1 - strand) // strands * self.lane_rows
        return whole + np.where(groups % strands == strand, rests, 0)


@dataclass(frozen=True)
class RowPlaces:
    """Rows of a step, lane by lane: columns (lanes, rows of a lane).

    `numbers` count the rows of their source in the lane, from 0 at the phase's beginning.
    """

    phase: PhaseLayout
    step: int
    lanes: Int64Array  # (lanes,)
    row_numbers: Int64Array
    sources: Int64Array
    numbers: Int64Array


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
        first_row = spec.first_row
        self.phases: list[PhaseLayout] = []
        for number, phase in enumerate(spec.phases):
            assert phase.global_batch_rows % spec.lanes == 0, f"{spec.lanes} lanes, {phase.global_batch_rows} rows"
            layout = PhaseLayout(number, phase, Mixture(phase.weights, spec.lanes), spec.lanes, first_row)
            self.phases.append(layout)
            if phase.steps is not None:
                first_row = layout.first_row_of(phase.first_step + phase.steps)
        self._strand_starts: dict[tuple[int, int, int], Int64Array] = {}

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
        sources = range(len(self.spec.sources))
        return np.stack([phase.rows_before(source, lanes, step) for source in sources])

    def _places(self, phase: PhaseLayout, step: int, lanes: Int64Array, counts: Int64Array) -> RowPlaces:
        turns = np.arange(phase.lane_rows)
        row_numbers = phase.first_row_of(step) + turns * self.spec.lanes + lanes[:, None]
        if len(counts) == 1:
            numbers = counts[0][:, None] + turns
            return RowPlaces(phase, step, lanes, row_numbers, np.zeros_like(numbers), numbers)
        sources = phase.mixture.sources(lanes[:, None], (step - phase.spec.first_step) * phase.lane_rows + turns)
        numbers = np.empty_like(sources)
        for source, before in enumerate(counts):
            is_source = sources == source
            earlier = np.cumsum(is_source, axis=1) - is_source
            numbers = np.where(is_source, before[:, None] + earlier, numbers)
        return RowPlaces(phase, step, lanes, row_numbers, sources, numbers)

    # ------------------------------------------------------------ strands

    def source_tokens(self, step: int) -> Int64Array:
        """(sources,): tokens of each source in all rows before a data step."""
        return np.array([self.tokens_read(source, 1, step).sum() for source in range(len(self.spec.sources))])

    def tokens_read(self, source: int, strands: int, step: int) -> Int64Array:
        """(lanes × strands,): what the strands of a source's lanes have read of it before a data step."""
        lanes = np.arange(self.spec.lanes)
        total = np.zeros(self.spec.lanes * strands, np.int64)
        for phase, following in zip(self.phases, [*self.phases[1:], None], strict=True):
            last = step if following is None else min(step, following.spec.first_step)
            if last > phase.spec.first_step:
                rows = phase.strand_rows(phase.rows_before(source, lanes, last), strands)
                total += rows.reshape(-1) * phase.spec.sequence_length
        return total

    def positions(self, places: RowPlaces, sources: Sequence[SourceLanes]) -> tuple[Int64Array, Int64Array]:
        """Where rows begin: in the lives of which strands, and at which positions; both (lanes, rows of a lane)."""
        strands, positions = np.empty_like(places.numbers), np.empty_like(places.numbers)
        for number, source in enumerate(sources):
            of_lane, rows = places.phase.strand_of(places.numbers, source.strands)
            strand = places.lanes[:, None] * source.strands + of_lane
            start = self._strand_start(places.phase, number, source.strands)[strand]
            is_source = places.sources == number
            np.copyto(strands, strand, where=is_source)
            np.copyto(positions, start + rows * places.phase.spec.sequence_length, where=is_source)
        return strands, positions

    def _strand_start(self, phase: PhaseLayout, source: int, strands: int) -> Int64Array:
        """(lanes × strands,): where a phase begins in the lives of a source's strands."""
        key = phase.number, source, strands
        if key not in self._strand_starts:
            self._strand_starts[key] = self.tokens_read(source, strands, phase.spec.first_step)
        return self._strand_starts[key]

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
        line = lanes.line
        read = self.tokens_read(source, lanes.strands, steps).tolist()
        epochs = 1 + max(
            (line.epoch_of(strand, tokens - 1) for strand, tokens in enumerate(read) if tokens), default=-1
        )
        for epoch in range(epochs):
            for window, begin, stop in line.windows_of(first, last, epoch):
                slices, firsts = lanes.window_slices(window)
                ends = np.cumsum(slices.length)
                for index in np.flatnonzero((firsts < stop) & (firsts + slices.length > begin)).tolist():
                    low, high = max(begin, int(firsts[index])), min(stop, int(firsts[index] + slices.length[index]))
                    position = window.life + int(ends[index] - slices.length[index]) + low - int(firsts[index])
                    strand = window.lane  # each strand is a lane of the source's line
                    yield from self._spans(source, lanes.strands, strand, position, low, high - low, steps)

    def _spans(
        self, source: int, strands: int, strand: int, position: int, line: int, tokens: int, steps: int
    ) -> Iterator[RowSpan]:
        """The rows that hold `tokens` tokens from a position of a strand's life on."""
        lane, of_lane = divmod(strand, strands)
        while tokens:
            phase, start = next(
                (phase, start)
                for phase in reversed(self.phases)
                if (start := int(self._strand_start(phase, source, strands)[strand])) <= position
            )
            if not phase.spec.weights[source]:
                return  # the source has ended: no row will hold it
            row_of_strand, offset = divmod(position - start, phase.spec.sequence_length)
            row = phase.mixture.row_of(source, lane, phase.number_of(of_lane, row_of_strand, strands))
            steps_on, turn = divmod(row, phase.lane_rows)
            step = phase.spec.first_step + steps_on
            if step >= steps:
                return
            taken = min(phase.spec.sequence_length - offset, tokens)
            row_number = phase.first_row_of(step) + turn * self.spec.lanes + lane
            yield RowSpan(step, row_number, lane, phase.number, offset, taken, line)
            position, line, tokens = position + taken, line + taken, tokens - taken
