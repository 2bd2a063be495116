"""Makes a rank's rows, step by step: lanes are read, packed and masked, and digests taken. Knows nothing of processes.

    layout ─► slices of documents ─► packed rows ─► pairs, where the recipe asks for them ─► masks ─► digest

Which rows those are follows from the step (`layout.py`); the rows of a step come in the order of their numbers.
"""

from collections.abc import Iterator

import numpy as np

from dstrain.data.lanes import SourceLanes
from dstrain.data.layout import Layout, PhaseLayout, RowPlaces
from dstrain.data.masking import Masker, Vocabulary
from dstrain.data.packing import pack
from dstrain.data.pairs import Pairing
from dstrain.data.rows import Records, StepBuffer, StepShape
from dstrain.data.shards import Corpus, TokenIds
from dstrain.data.spec import SourceSpec, StreamSpec
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import CorpusError
from dstrain.recipe.pair_slots import pair_slots

CACHED_TOKENS = 1 << 16  # made at a time: all arrays on the way then stay in the processor's cache
LARGEST_SCRATCH_BYTES = 1 << 24


def step_shape(spec: StreamSpec, phase: PhaseLayout, rank: int, world: int) -> StepShape:
    """The sizes of a rank's step in a phase."""
    length = phase.spec.sequence_length
    return StepShape(
        rows=len(range(rank, spec.lanes, world)) * phase.lane_rows,
        row_tokens=length,
        masked=phase.spec.most_masked,
        pairs=pair_slots(length) if spec.pair_objective else 0,
    )


def largest_step_bytes(spec: StreamSpec, layout: Layout, rank: int, world: int) -> int:
    """The size of a buffer that has room for a rank's step in any phase."""
    return max(step_shape(spec, phase, rank, world).bytes for phase in layout.phases)


class StreamTokenizer:
    """The tokenizer of a stream, or its vocabulary alone."""

    def __init__(self, spec: StreamSpec) -> None:
        self.tokenizer: DocumentTokenizer | None = None
        if spec.tokenizer is not None:
            self.tokenizer = load_document_tokenizer(spec.tokenizer)
        vocabulary = spec.vocabulary or (self.tokenizer.vocabulary if self.tokenizer else None)
        assert vocabulary is not None, "a stream needs a tokenizer or a vocabulary"
        self.vocabulary: Vocabulary = vocabulary


def open_source(spec: StreamSpec, source: SourceSpec, tokenizer: StreamTokenizer) -> SourceLanes:
    """Open one corpus of a stream.

    Raises:
        CorpusError: it cannot be read, is of another tokenizer, or has fewer tokens than lanes.
    """
    corpus = Corpus.open(
        source.location,
        text_field=spec.text_field,
        tokenizer=tokenizer.tokenizer,
        on_bad_sample=spec.on_bad_sample,
        max_bad_samples=spec.max_bad_samples,
    )
    if corpus.largest_id >= tokenizer.vocabulary.size:
        raise CorpusError(
            f"{source.location}: holds token id {corpus.largest_id}, but the vocabulary has "
            f"{tokenizer.vocabulary.size}; use the tokenizer that the shards were built with, or build them again with "
            "this one"
        )
    return SourceLanes(corpus, spec)


class RankRows:
    """The rows of rank `rank` of `world`, from data step `first_step` on."""

    def __init__(self, spec: StreamSpec, rank: int, world: int, first_step: int) -> None:
        """Open the corpora. Raises CorpusError."""
        self._spec, self._rank, self._world = spec, rank, world
        self._tokenizer = StreamTokenizer(spec)
        self.layout = Layout(spec)
        self._lanes = self.layout.own_lanes(rank, world)
        self._sources = [open_source(spec, source, self._tokenizer) for source in spec.sources]
        for source in self._sources:
            source.keep_open(len(self._lanes))
        _keep_freed_memory()
        self._steps: Iterator[RowPlaces] = self.layout.walk(self._lanes, first_step)
        self._makers: dict[int, _RowMaker] = {}  # by phase

    @property
    def buffer_bytes(self) -> int:
        """The size of a buffer that has room for any step."""
        return largest_step_bytes(self._spec, self.layout, self._rank, self._world)

    def shape(self, step: int) -> StepShape:
        """The sizes of a step."""
        return step_shape(self._spec, self.layout.phase_at(step), self._rank, self._world)

    def make(self, buffer: StepBuffer) -> None:
        """Make the next step's rows. Raises CorpusError for shards that cannot be read."""
        places = next(self._steps)
        phase = places.phase
        if phase.number not in self._makers:
            self._makers = {phase.number: _RowMaker(self._spec, phase, self._tokenizer)}  # no phase comes again
        maker = self._makers[phase.number]
        buffer.digest[...] = 0
        buffer.step[...] = places.step
        buffer.sources[...] = places.sources.T.reshape(-1)
        lanes_at_once = max(1, CACHED_TOKENS // (phase.lane_rows * phase.spec.sequence_length))
        in_turn = buffer.records.items.reshape(phase.lane_rows, len(self._lanes), -1)
        # A lane's rows of one source follow one another in it: they are read together, and then put in their turn.
        order = np.argsort(places.sources, axis=1, kind="stable")
        by_source = places.reordered(order)
        lane_numbers = np.arange(len(self._lanes))[:, None]
        for first in range(0, len(self._lanes), lanes_at_once):
            some = slice(first, first + lanes_at_once)
            made = maker.make(by_source, some, self._read(by_source, some))
            buffer.digest += made.digest()
            in_turn[order[some], lane_numbers[some]] = made.items.reshape(-1, *in_turn.shape[::2])

    def _read(self, places: RowPlaces, some: slice) -> list[TokenIds]:
        """The tokens of the rows of some lanes, lane by lane and source by source, as slices of documents."""
        slices: list[TokenIds] = []
        sources, row_tokens = places.sources[some], places.phase.spec.sequence_length
        begins = np.ones(sources.shape, np.bool_)  # where rows of another source, or of another lane, begin
        begins[:, 1:] = sources[:, 1:] != sources[:, :-1]
        runs = np.flatnonzero(begins)
        tokens = np.diff(runs, append=sources.size) * row_tokens
        lanes, positions = places.lanes[some][runs // sources.shape[1]], places.positions[some].reshape(-1)[runs]
        columns = (sources.reshape(-1)[runs], lanes, positions, tokens)
        readers = [source.read for source in self._sources]
        for source, lane, position, count in zip(*(column.tolist() for column in columns), strict=True):
            readers[source](lane, position, count, slices)
        return slices


class _RowMaker:
    """Makes rows of one phase out of documents."""

    def __init__(self, spec: StreamSpec, phase: PhaseLayout, tokenizer: StreamTokenizer) -> None:
        self._spec, self._phase, self._vocabulary = spec, phase, tokenizer.vocabulary
        length, known = phase.spec.sequence_length, tokenizer.tokenizer
        assert spec.masking_unit == "token" or known, "a vocabulary alone does not know words"
        self._shape = StepShape(1, length, phase.spec.most_masked, pair_slots(length) if spec.pair_objective else 0)
        self._masker = Masker(
            tokenizer.vocabulary,
            length,
            phase.spec.most_masked,
            spec.masking_replace,
            spec.seed,
            spec.purpose,
            spec.masking_unit,
            known.continuing_ids() if known and spec.masking_unit != "token" else None,
        )
        self._pairing: Pairing | None = None
        if spec.pair_objective:
            assert known, "a vocabulary alone does not know what stands around texts"
            self._pairing = Pairing(
                spec.pair_objective, spec.pair_tokens, known.cls_id, known.sep_id, length, spec.seed, spec.purpose
            )

    def make(self, places: RowPlaces, some: slice, slices: list[TokenIds]) -> Records:
        """The rows of some lanes, lane by lane, of the slices of documents that they hold."""
        row_numbers = places.row_numbers[some].reshape(-1)
        ids, position_ids = pack(slices, len(row_numbers), self._phase.spec.sequence_length)
        self._check_ids(ids.view(np.uint32).max(), places.step)
        made = Records(self._shape, np.empty((len(row_numbers), self._shape.record_items), np.int32))
        made.row_numbers[...] = row_numbers
        if self._pairing:
            made.pairs[...] = self._pairing.make(ids, position_ids, row_numbers)
        masked = self._phase.spec.masked_per_row(places.step)
        made.masked_positions[...], made.labels[...] = self._masker.mask(ids, row_numbers, masked)
        made.input_ids[...], made.position_ids[...] = ids, position_ids
        return made

    def _check_ids(self, largest_id: np.uint32, step: int) -> None:
        """No id may lie beyond the vocabulary: the index said so when the corpus was opened."""
        if largest_id >= self._vocabulary.size:
            raise CorpusError(
                f"a token id of {largest_id} in step {step}, beyond the vocabulary's {self._vocabulary.size}: the "
                "index of a shard is wrong; find it with `dstrain shards check` on each source"
            )


def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of a step's arrays instead of giving it back to the system after each one.

    Its limits for that grow with the largest block it has seen freed (mallopt(3), M_MMAP_THRESHOLD). Without this,
    every step pays for the same pages again: a quarter of its time.
    """
    np.empty(LARGEST_SCRATCH_BYTES, np.uint8)
