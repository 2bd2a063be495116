"""Which tokens of a row are predicted, and what the model sees instead: a pure function of (seed, row number, row).

Each position of a row draws a number; the `K` positions with the smallest draws are masked. Special tokens take no
part. With `unit: word` or `span`, the pieces of a word, or the words of a span, share the draw of the first of them,
and so are masked together; the last unit is cut where `K` is reached. A row is cut into spans at random, after each
word with the same probability: their lengths are geometric, with SpanBERT's mean (Joshi et al. 2020, section 3.1).

A second draw for each masked token decides, as in BERT (Devlin et al. 2019, section 3.1), whether the model sees the
mask token, a random token or the token itself. All draws are keyed by seed and row number only, so no rank, worker or
restart can change a mask, and every epoch has new ones since its rows have new numbers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstrain.data.counter_rng import Uint64Array, draws, stream_key

NO_LABEL = -100  # what torch.nn.functional.cross_entropy ignores by default
FIRST_REPLACEMENT = 1 << 32  # counter of the draw for a row's first masked token; counters below it choose the tokens
FIRST_SPAN = 1 << 33  # counter of the draws that say whether a span begins
NEVER = np.uint32(0xFFFFFFFF)
MEAN_SPAN_WORDS = 3.8  # SpanBERT's

Unit = Literal["token", "word", "span"]


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer: ids run from 0 to `size` - 1; `special_ids` are never masked nor drawn."""

    size: int
    mask_id: int
    special_ids: tuple[int, ...]


def masked_per_row(rate: float, sequence_length: int) -> int:
    """How many tokens of every row are predicted (the `K` of all shapes)."""
    return max(1, round(rate * sequence_length))


class Masker:
    """Masks batches of rows in place.

    `rate` is the share of a row's positions that is predicted; `replace` the shares of those that the model sees as
    (mask token, random token, itself). `purpose` keeps the masks of training and validation apart. `continuing_ids` are
    the pieces that go on with a word, which units longer than a token need.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sequence_length: int,
        rate: float,
        replace: tuple[float, float, float],
        seed: int,
        purpose: str,
        unit: Unit = "token",
        continuing_ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.masked_per_row = masked_per_row(rate, sequence_length)
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
        self._replacement_counters = np.arange(self.masked_per_row, dtype=np.uint64) + np.uint64(FIRST_REPLACEMENT)
        self._below_mask = np.uint64(round(replace[0] * 2**32))
        self._below_random = np.uint64(round((replace[0] + replace[1]) * 2**32))

    def mask(
        self, input_ids: NDArray[np.int32], row_numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Mask `input_ids` (rows, tokens) in place. Returns masked positions and labels, both (rows, masked per row).

        Positions increase within a row. A row with fewer candidates than `masked_per_row` has positions 0 and labels
        -100 at its end.
        """
        assert input_ids.flags.c_contiguous
        row_keys = draws(self._key, row_numbers.astype(np.uint64))[:, None]
        return self._replace(input_ids, row_keys, self._choose(input_ids, row_keys))

    def _choose(self, ids: NDArray[np.int32], row_keys: Uint64Array) -> NDArray[np.int64]:
        """Increasing positions (rows, masked per row); `sequence_length` stands where a row has too few candidates."""
        # Two positions share the halves of a draw. The position replaces a score's lowest bits: so ties are impossible,
        # and it can be read back. Partitioning 32-bit numbers is seven times faster than 64-bit ones.
        halves = draws(row_keys, self._choice_counters).view(np.uint32)[:, : self._sequence_length]
        if self._unit != "token":
            halves = np.take_along_axis(halves, self._unit_starts(ids, row_keys), axis=1)
        scores = halves & ~self._position_bits  # (rows, tokens)
        scores |= self._positions
        scores |= self._exclusion.take(ids)
        smallest = np.partition(scores, self.masked_per_row - 1, axis=1)[:, : self.masked_per_row]
        chosen = smallest & self._position_bits
        chosen.sort(axis=1)
        return np.minimum(chosen.astype(np.int64), self._sequence_length)  # an excluded token reads back as all ones

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
        positions = np.where(valid, chosen, 0)
        places = positions + np.arange(0, ids.size, self._sequence_length)[:, None]  # in all rows laid end to end
        all_ids = ids.reshape(-1)
        original = all_ids.take(places)
        random_bits = draws(row_keys, self._replacement_counters)
        action, pick = random_bits >> np.uint64(32), random_bits & np.uint64(0xFFFFFFFF)
        random_ids = self._ordinary_ids.take((pick * np.uint64(len(self._ordinary_ids))) >> np.uint64(32))
        replacement = np.where(action < self._below_random, random_ids, original)
        replacement[action < self._below_mask] = self._mask_id
        all_ids[places[valid]] = replacement[valid]
        return positions, np.where(valid, original, NO_LABEL)
