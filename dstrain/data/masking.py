"""Which tokens of a row are predicted, and what the model sees instead: a pure function of (seed, row number, row).

Each position of a row draws a number; the `K` positions with the smallest draws are masked. Special tokens take no
part. With `unit: word` or `span`, the tokens of a word, or the words of a span, share the draw of the first of them,
and so stand together in the order of the draws. That order is taken as a circle, and `K` positions side by side from a
drawn place on are masked: units are masked whole but for the two at the ends, and every position of a row is as likely
to be masked as any other, whatever the length of its unit and wherever the row begins. A row is cut into spans at
random, after each word with the same probability: their lengths are geometric, with SpanBERT's mean (Joshi et al.
2020, section 3.1).

A second draw for each masked token decides, as in BERT (Devlin et al. 2019, section 3.1), whether the model sees the
mask token, a random token or the token itself. All draws are keyed by seed and row number only, so no rank, worker or
restart can change a mask, and every epoch has new ones since its rows have new numbers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import Uint64Array, draws, stream_key

NO_LABEL = -100  # what torch.nn.functional.cross_entropy ignores by default
FIRST_REPLACEMENT = 1 << 32  # counter of the draw for a row's first masked token; counters below it choose the tokens
FIRST_SPAN = 1 << 33  # counter of the draws that say whether a span begins
CIRCLE_START = 1 << 34  # counter of the draw that says where on the circle of units the masked ones begin
NEVER = np.uint32(0xFFFFFFFF)
MEAN_SPAN_WORDS = 3.8  # SpanBERT's

Unit = Literal["token", "word", "span"]


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer: ids run from 0 to `size` - 1; `special_ids` are never masked nor drawn."""

    size: int
    mask_id: int
    special_ids: tuple[int, ...]


class Masker:
    """Masks batches of rows in place.

    At most `most_masked` positions of a row are predicted; `replace` has the shares of those that the model sees as
    (mask token, random token, itself). `purpose` keeps the masks of training and validation apart. `continuing_ids` are
    the tokens that go on with a word, which units longer than a token need.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sequence_length: int,
        most_masked: int,
        replace: tuple[float, float, float],
        seed: int,
        purpose: str,
        unit: Unit = "token",
        continuing_ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.most_masked = most_masked
        self._key = stream_key(seed, purpose, "mask")
        self._mask_id = np.int32(vocabulary.mask_id)
        special = np.array(sorted(vocabulary.special_ids), np.int64)
        self._ordinary_ids = np.setdiff1d(np.arange(vocabulary.size), special).astype(np.int32)
        assert len(self._ordinary_ids) > 0, "a vocabulary of special tokens only"
        # All bits set for a special id: or-ed into its score, it sorts behind every candidate.
        self._exclusion = np.zeros(vocabulary.size, np.uint32)
        self._exclusion[special] = NEVER
        self._unit = unit
        self._continues = np.zeros(vocabulary.size, np.bool_)
        if unit != "token":
            assert continuing_ids is not None, f"{unit}s of a vocabulary whose words are not known"
            self._continues[continuing_ids] = True
            self._continues[special] = False
        self._span_counters = np.arange(sequence_length, dtype=np.uint64) + np.uint64(FIRST_SPAN)
        self._sequence_length = sequence_length
        self._positions = np.arange(sequence_length, dtype=np.uint32)
        self._position_bits = np.uint32((1 << sequence_length.bit_length()) - 1)
        self._choice_counters = np.arange((sequence_length + 1) // 2, dtype=np.uint64)
        self._replacement_counters = np.arange(most_masked, dtype=np.uint64) + np.uint64(FIRST_REPLACEMENT)
        self._below_mask = np.uint64(round(replace[0] * 2**32))
        self._below_random = np.uint64(round((replace[0] + replace[1]) * 2**32))

    def mask(
        self, input_ids: NDArray[np.int32], row_numbers: NDArray[np.int64], masked: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Mask `input_ids` (rows, tokens) in place. Returns masked positions and labels, both (rows, most masked).

        Positions increase within a row. A row with fewer candidates than `masked` has positions 0 and labels -100 at
        its end.

        Args:
            input_ids: documents' tokens.
            row_numbers: (rows,), of the run.
            masked: how many tokens of each row; None for as many as there is room for.
        """
        assert input_ids.flags.c_contiguous
        masked = self.most_masked if masked is None else masked
        row_keys = draws(self._key, row_numbers.astype(np.uint64))[:, None]
        choose = self._choose_tokens if self._unit == "token" else self._choose_units
        chosen = choose(input_ids, row_keys, masked)
        if masked < self.most_masked:
            room = ((0, 0), (0, self.most_masked - masked))
            chosen = np.pad(chosen, room, constant_values=self._sequence_length)
        return self._replace(input_ids, row_keys, chosen)

    def _choose_tokens(self, ids: NDArray[np.int32], row_keys: Uint64Array, masked: int) -> NDArray[np.int64]:
        """Increasing positions (rows, masked); `sequence_length` stands where a row has too few candidates."""
        scores = self._scores(ids, self._halves(row_keys))
        smallest = np.partition(scores, masked - 1, axis=1)[:, :masked]
        chosen = smallest & self._position_bits
        chosen.sort(axis=1)
        return np.minimum(chosen.astype(np.int64), self._sequence_length)  # an excluded token reads back as all ones

    def _choose_units(self, ids: NDArray[np.int32], row_keys: Uint64Array, masked: int) -> NDArray[np.int64]:
        """The same for words and spans: `masked` places side by side on the circle of all candidates."""
        halves = np.take_along_axis(self._halves(row_keys), self._unit_starts(ids, row_keys), axis=1)
        scores = self._scores(ids, halves)
        scores.sort(axis=1)
        candidates = (scores != NEVER).sum(axis=1, keepdims=True).astype(np.uint64)
        drawn = draws(row_keys, np.array([CIRCLE_START], np.uint64)) >> np.uint64(32)
        start = (drawn * candidates) >> np.uint64(32)
        turns = np.arange(masked, dtype=np.uint64)
        places = (start + turns) % np.maximum(candidates, np.uint64(1))
        chosen = (np.take_along_axis(scores, places.astype(np.int64), axis=1) & self._position_bits).astype(np.int64)
        chosen[turns >= candidates] = self._sequence_length
        chosen.sort(axis=1)
        return np.minimum(chosen, self._sequence_length)

    def _halves(self, row_keys: Uint64Array) -> NDArray[np.uint32]:
        """A draw for each position, (rows, tokens): two positions share the halves of one."""
        return draws(row_keys, self._choice_counters).view(np.uint32)[:, : self._sequence_length]

    def _scores(self, ids: NDArray[np.int32], halves: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """What positions are sorted by, (rows, tokens): `NEVER` for special tokens.

        The position replaces a draw's lowest bits: so ties are impossible, and it can be read back. Partitioning 32-bit
        numbers is seven times faster than 64-bit ones.
        """
        scores = halves & ~self._position_bits
        scores |= self._positions
        scores |= self._exclusion.take(ids)
        return scores

    def _unit_starts(self, ids: NDArray[np.int32], row_keys: Uint64Array) -> NDArray[np.int64]:
        """(rows, tokens): where the word or span that a token is of begins. Special tokens stand between units."""
        special = self._exclusion.take(ids) != 0
        begins = ~self._continues.take(ids)
        if self._unit == "span":
            begins &= draws(row_keys, self._span_counters) < np.uint64(2**64 / MEAN_SPAN_WORDS)
        begins |= special
        begins[:, 1:] |= special[:, :-1]
        begins[:, 0] = True
        return np.maximum.accumulate(np.where(begins, self._positions.astype(np.int64), 0), axis=1)

    def _replace(
        self, ids: NDArray[np.int32], row_keys: Uint64Array, chosen: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Put in what the model sees. Returns masked positions and labels."""
        valid = chosen < self._sequence_length
        all_valid = bool(valid.all())  # as nearly always, which spares some copies
        positions = chosen if all_valid else np.where(valid, chosen, 0)
        places = positions + np.arange(0, ids.size, self._sequence_length)[:, None]  # in all rows laid end to end
        all_ids = ids.reshape(-1)
        original = all_ids.take(places)
        random_bits = draws(row_keys, self._replacement_counters)
        action = random_bits >> np.uint64(32)
        replacement = np.where(action < self._below_mask, self._mask_id, original)
        becomes_random = np.flatnonzero((action >= self._below_mask) & (action < self._below_random))  # one in ten
        pick = random_bits.reshape(-1)[becomes_random] & np.uint64(0xFFFFFFFF)
        random_ids = self._ordinary_ids.take((pick * np.uint64(len(self._ordinary_ids))) >> np.uint64(32))
        replacement.reshape(-1)[becomes_random] = random_ids
        if all_valid:
            all_ids[places] = replacement
            return positions, original
        all_ids[places[valid]] = replacement[valid]
        return positions, np.where(valid, original, NO_LABEL)
