"""Makes a rank's rows, step by step: lanes are read, packed and masked, and digests taken. Knows nothing of processes.

Where the recipe asks for pairs, they are made of a packed row before it is masked.

Row r of the run belongs to lane r mod lanes, and rank k of W consumes the rows with r mod W = k. Since W divides
lanes, and lanes divides the global batch, a rank owns the lanes k, k + W, …, and row j of its step comes from its
lane j mod (lanes / W).
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from dstrain.data.lane import Lane
from dstrain.data.masking import Masker, Unit, Vocabulary, masked_per_row
from dstrain.data.order import Order
from dstrain.data.packing import pack
from dstrain.data.pair_slots import pair_slots
from dstrain.data.pairs import Pairing, PairObjective
from dstrain.data.rows import Records, StepBuffer, StepShape
from dstrain.data.shards import DEFAULT_TEXT_FIELD, Corpus
from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import CorpusError

if TYPE_CHECKING:  # the data process has no use for pydantic
    from dstrain.recipe.schema import MaskedLmRecipe

CACHED_TOKENS = 1 << 16  # made at a time: all arrays on the way then stay in the processor's cache
LARGEST_SCRATCH_BYTES = 1 << 24
REPORTS_PER_STEP = 8  # bad samples described in words; all are counted

Purpose = Literal["train", "valid"]


@dataclass(frozen=True)
class StreamSpec:
    """Everything that the rows of a run depend on. Two streams with equal specs and equal corpora are the same stream.

    `tokenizer` is a tokenizer's folder; token shards can do without one when `vocabulary` is given.
    """

    corpus: str
    sequence_length: int
    lanes: int
    global_batch_rows: int
    seed: int
    shuffle_window: int
    masking_rate: float
    masking_replace: tuple[float, float, float]
    tokenizer: str | None
    vocabulary: Vocabulary | None = None
    text_field: str = DEFAULT_TEXT_FIELD
    on_bad_sample: Literal["stop", "skip"] = "stop"
    purpose: Purpose = "train"
    masking_unit: Unit = "token"
    pair_objective: PairObjective | None = None
    pair_tokens: int = 0

    @classmethod
    def from_recipe(cls, recipe: "MaskedLmRecipe", purpose: Purpose) -> Self:
        """The stream of a recipe's `data.train` or `data.valid`."""
        data = recipe.data
        corpus = data.train if purpose == "train" else data.valid
        assert corpus is not None, "a validation stream of a recipe without data.valid"
        return cls(
            corpus=corpus,
            sequence_length=data.sequence_length,
            lanes=data.lanes,
            global_batch_rows=recipe.train.global_batch_rows,
            seed=data.seed,
            shuffle_window=data.shuffle_window,
            masking_rate=data.masking.rate,
            masking_replace=data.masking.replace,
            tokenizer=recipe.tokenizer,
            text_field=data.text_field,
            on_bad_sample=data.on_bad_sample,
            purpose=purpose,
            masking_unit=data.masking.unit,
            pair_objective=None if data.pairs.objective == "none" else data.pairs.objective,
            pair_tokens=data.pairs.tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """For the way into another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        vocabulary = content["vocabulary"]
        if vocabulary is not None:
            vocabulary = Vocabulary(vocabulary["size"], vocabulary["mask_id"], tuple(vocabulary["special_ids"]))
        return cls(**{**content, "masking_replace": tuple(content["masking_replace"]), "vocabulary": vocabulary})


def step_shape(spec: StreamSpec, world: int) -> StepShape:
    """The sizes of one rank's step. `world` must divide `lanes`, and `lanes` the global batch."""
    assert spec.lanes % world == 0, f"{world} ranks do not divide {spec.lanes} lanes"
    assert spec.global_batch_rows % spec.lanes == 0, f"{spec.lanes} lanes do not divide {spec.global_batch_rows} rows"
    return StepShape(
        rows=spec.global_batch_rows // world,
        row_tokens=spec.sequence_length,
        masked=masked_per_row(spec.masking_rate, spec.sequence_length),
        lanes=spec.lanes // world,
        pairs=pair_slots(spec.sequence_length) if spec.pair_objective else 0,
    )


class RankRows:
    """The rows of rank `rank` of `world`, from the lanes' `cursors` on: (lanes, 3), or None for the start."""

    def __init__(self, spec: StreamSpec, rank: int, world: int, cursors: NDArray[np.int64] | None) -> None:
        """Open the corpus and this rank's lanes. Raises CorpusError."""
        self.shape = step_shape(spec, world)
        self._spec, self._rank, self._world = spec, rank, world
        encoder = load_document_tokenizer(spec.tokenizer) if spec.tokenizer is not None else None
        vocabulary = spec.vocabulary or (encoder.vocabulary if encoder else None)
        assert vocabulary is not None, "a stream needs a tokenizer or a vocabulary"
        self._vocabulary = vocabulary
        self._corpus = Corpus.open(spec.corpus, text_field=spec.text_field, encode=encoder.encode if encoder else None)
        self._check_tokenizer(encoder.digest if encoder else None)
        # A lane touches the shard that it reads and, at a window's end, the next one.
        self._corpus.keep_open(2 * self.shape.lanes)
        order = Order(self._corpus.document_counts, spec.lanes, spec.seed, spec.shuffle_window, spec.purpose)
        own = range(rank, spec.lanes, world)
        starts = (
            [(0, 0, 0)] * len(own)
            if cursors is None
            else [(int(e), int(p), int(o)) for e, p, o in cursors[rank::world]]
        )
        assert len(starts) == len(own), f"{len(starts)} cursors for {len(own)} lanes"
        self._lanes = [
            Lane(lane, self._corpus, order, start, spec.on_bad_sample) for lane, start in zip(own, starts, strict=True)
        ]
        _keep_freed_memory()
        self._rows_per_lane = self.shape.rows // self.shape.lanes
        self._lanes_at_once = max(1, CACHED_TOKENS // (self._rows_per_lane * spec.sequence_length))
        assert spec.masking_unit == "token" or encoder, "a vocabulary alone does not know words"
        self._masker = Masker(
            vocabulary,
            spec.sequence_length,
            spec.masking_rate,
            spec.masking_replace,
            spec.seed,
            spec.purpose,
            spec.masking_unit,
            encoder.continuing_ids() if encoder and spec.masking_unit != "token" else None,
        )

        self._pairing: Pairing | None = None
        if spec.pair_objective:
            assert encoder, "a vocabulary alone does not know what stands around texts"
            self._pairing = Pairing(
                spec.pair_objective,
                spec.pair_tokens,
                encoder.cls_id,
                encoder.sep_id,
                spec.sequence_length,
                spec.seed,
                spec.purpose,
            )

    def make(self, step: int, buffer: StepBuffer) -> tuple[str, ...]:
        """Make the next step's rows, numbered as those of global step `step`. Returns descriptions of skipped samples.

        Raises CorpusError for bad samples that stop the run.
        """
        buffer.digest[...] = 0
        for first in range(0, len(self._lanes), self._lanes_at_once):
            self._make_lanes(step, buffer, slice(first, first + self._lanes_at_once))
        reports = [report for lane in self._lanes for report in lane.bad_samples]
        for lane in self._lanes:
            lane.bad_samples.clear()
        buffer.step_and_bad_samples[...] = step, len(reports)
        return tuple(reports[:REPORTS_PER_STEP])

    def _make_lanes(self, step: int, buffer: StepBuffer, which: slice) -> None:
        """Make the rows of some lanes, lane by lane, and put them where they stand in the step: in turn."""
        lanes = self._lanes[which]
        rows = len(lanes) * self._rows_per_lane
        pieces = []
        for lane in lanes:
            pieces += lane.read(self._rows_per_lane * self._spec.sequence_length)
        ids, position_ids = pack(pieces, rows, self._spec.sequence_length)
        self._check_ids(ids, step)
        made = Records(self.shape, np.empty((rows, self.shape.record_items), np.int32))
        first_row = step * self._spec.global_batch_rows + self._rank
        all_row_numbers = first_row + self._world * np.arange(self.shape.rows)
        made.row_numbers[...] = all_row_numbers.reshape(self._rows_per_lane, -1)[:, which].T.reshape(rows)
        if self._pairing:
            made.pairs[...] = self._pairing.make(ids, position_ids, made.row_numbers)
        made.masked_positions[...], made.labels[...] = self._masker.mask(ids, made.row_numbers)
        made.input_ids[...], made.position_ids[...] = ids, position_ids
        buffer.digest += made.digest()
        buffer.cursors[which] = [lane.cursor for lane in lanes]
        in_turn = buffer.records.items.reshape(self._rows_per_lane, self.shape.lanes, -1)
        in_turn[:, which] = made.items.reshape(len(lanes), self._rows_per_lane, -1).swapaxes(0, 1)

    def _check_ids(self, ids: NDArray[np.int32], step: int) -> None:
        """No id may lie beyond the vocabulary: with the index checked at the start, it would be a damaged shard."""
        largest_id = int(ids.view(np.uint32).max())  # a damaged id may be negative
        if largest_id >= self._vocabulary.size:
            raise CorpusError(
                f"{self._spec.corpus}: a token id of {largest_id} in step {step}, beyond the vocabulary's "
                f"{self._vocabulary.size}: a shard was changed after indexing; find it with `dstrain shards check`"
            )

    def _check_tokenizer(self, digest: str | None) -> None:
        """Token shards must be of the tokenizer that the run uses."""
        if self._corpus.kind != "tokens":
            return
        made_by = self._corpus.tokenizer_digest
        if made_by is not None and digest is not None and made_by != digest:
            raise CorpusError(
                f"{self._spec.corpus}: its token ids were made by another tokenizer ({made_by[:12]}…) than "
                f"{self._spec.tokenizer} "
                f"({digest[:12]}…); use that one, or build the shards again with this one"
            )
        if self._corpus.largest_id >= self._vocabulary.size:
            raise CorpusError(
                f"{self._spec.corpus}: holds token id {self._corpus.largest_id}, but the vocabulary has "
                f"{self._vocabulary.size}; use the "
                "tokenizer that the shards were built with, or build them again with this one"
            )


def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of a step's arrays instead of giving it back to the system after each one.

    Its limits for that grow with the largest block it has seen freed (mallopt(3), M_MMAP_THRESHOLD). Without this,
    every step pays for the same pages again: a quarter of its time.
    """
    np.empty(LARGEST_SCRATCH_BYTES, np.uint8)
