"""Pairs of texts beside masked-language modelling: a pure function of (seed, row number, row), made before masking.

    row          one document │ another document, cut in two pairs │ short
    pairs        [CLS] A [SEP] B [SEP] │ [CLS] A [SEP] B [SEP] │ [CLS] A [SEP] B [SEP] │ as it was

Each piece of a packed row is cut into equal parts of at most `tokens` tokens, and each part becomes a pair. The row
keeps its length: what stood where [CLS] and [SEP] have to be is overwritten, in every pair the same number of tokens.
Position ids restart at every pair, so that attention is confined to it. Parts of less than `SHORTEST_PAIR` tokens are
no pairs; they stay in the row for the masked tokens. A ends at a drawn place between a quarter and three quarters of
the text, mostly within a sentence, where BERT and ALBERT take whole sentences and cut only what is too long.

    sentence_order   A and B change places in half of the pairs (ALBERT; Lan et al. 2020, section 3.1)
    next_sentence    the pairs of a row are coupled, and half of the couples exchange their Bs (after BERT; Devlin et
                     al. 2019, section 3.1, which takes the other B from a random document of the corpus)

Where A and B lie is drawn before it is drawn what stands there, so that no length tells which it is: both Bs of a
couple have the same length. Half of the labels are negative in expectation, a couple's both or none. The partner is
half a row's pairs away: in another document, unless one has more than half of the row's pairs. So negatives come from
the same row, and from the same document where that fills it, which is harder to tell than BERT's. Of an odd number of
pairs the last has no partner, and no label. The order of A and B is easier to tell than ALBERT's where both are of a
whole short document: how it begins and ends then says it, too.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import draws, stream_key
from dstrain.data.masking import NO_LABEL
from dstrain.recipe.pair_slots import SHORTEST_PAIR, pair_slots

SPECIALS = 3  # of a pair

PairObjective = Literal["next_sentence", "sentence_order"]
Places = NDArray[np.int64]


def token_types(pairs: NDArray[np.int32], sequence_length: int) -> NDArray[np.int64]:
    """(rows, tokens): 1 for B and the [SEP] after it, else 0. `pairs` are those of `Pairing.make`."""
    changes = np.zeros((len(pairs), sequence_length + 1), np.int64)
    rows = np.arange(len(pairs))[:, None]
    np.add.at(changes, (rows, pairs[:, :, 1]), 1)
    np.add.at(changes, (rows, pairs[:, :, 2]), -1)
    return np.cumsum(changes[:, :-1], axis=1)


class Pairing:
    """Makes pairs of the pieces of rows, in place.

    `tokens` is the most that a pair has, at least twice `SHORTEST_PAIR`. `purpose` keeps the pairs of training and
    validation apart.
    """

    def __init__(
        self,
        objective: PairObjective,
        tokens: int,
        cls_id: int,
        sep_id: int,
        sequence_length: int,
        seed: int,
        purpose: str,
    ) -> None:
        assert tokens >= 2 * SHORTEST_PAIR, "a piece that is cut must leave no part too short for a pair"
        self._exchanges = objective == "next_sentence"
        self._tokens = tokens
        self._cls_id, self._sep_id = cls_id, sep_id
        self._sequence_length = sequence_length
        self._key = stream_key(seed, purpose, "pairs")

    def make(
        self, input_ids: NDArray[np.int32], position_ids: NDArray[np.int32], row_numbers: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """Make pairs of `input_ids`, whose pieces begin where `position_ids` are 0; both (rows, tokens), in place.

        Returns the pairs, (rows, P, 4): where A begins with [CLS], where B begins, where it has ended, and the label: 0
        if A and B are as they were, 1 if not, -100 where nothing can be learnt. Empty slots, at a row's end, have
        places 0 and label -100.
        """
        assert input_ids.flags.c_contiguous and position_ids.flags.c_contiguous
        ids, rows = input_ids.reshape(-1), len(row_numbers)
        starts, lengths = self._cut(position_ids.reshape(-1))
        ends, row = starts + lengths, starts // self._sequence_length
        slot, couple, partner = self._coupled(row, rows)

        bits = draws(draws(self._key, row_numbers.astype(np.uint64))[row], couple.astype(np.uint64))
        text = np.minimum(lengths, lengths[partner]) - SPECIALS  # tokens of A and B, as far as a couple shares it
        least = text // 4
        more = (bits >> np.uint64(32)) * (text - 2 * least + 1).astype(np.uint64) >> np.uint64(32)
        of_b = least + more.astype(np.int64)
        seconds = ends - 1 - of_b
        labels = (bits & np.uint64(1)).astype(np.int64)
        if self._exchanges:
            labels[partner == np.arange(len(partner))] = NO_LABEL
            changed = labels == 1
            _copy(ids, seconds[partner[changed]], seconds[changed], of_b[changed])
        else:
            changed = labels == 1
            begin, of_a, of_b = starts[changed] + 1, (seconds - starts)[changed] - 2, of_b[changed]
            last, first = ends[changed] - 1 - of_a, begin  # as long as A will be, from the end; as B, from the start
            targets = np.concatenate([begin, seconds[changed]])
            _copy(ids, np.concatenate([last, first]), targets, np.concatenate([of_a, of_b]))
        ids[starts] = self._cls_id
        ids[seconds - 1] = self._sep_id
        ids[ends - 1] = self._sep_id

        origin = row * self._sequence_length
        pairs = np.zeros((rows, pair_slots(self._sequence_length), 4), np.int32)
        pairs[:, :, 3] = NO_LABEL
        pairs[row, slot] = np.stack([starts - origin, seconds - origin, ends - origin, labels], axis=1)
        return pairs

    def _cut(self, position_ids: NDArray[np.int32]) -> tuple[Places, Places]:
        """Starts and lengths of the pairs, on the line of all rows. Position ids restart at each, in place."""
        starts = np.flatnonzero(position_ids == 0)
        lengths = np.diff(starts, append=len(position_ids))
        parts = -(-lengths // self._tokens)
        piece = np.repeat(np.arange(len(starts)), parts)
        number = np.arange(len(piece)) - np.repeat(np.cumsum(parts) - parts, parts)  # of a part within its piece
        starts = starts[piece] + number * lengths[piece] // parts[piece]
        lengths = np.diff(starts, append=len(position_ids))
        position_ids[...] = np.arange(len(position_ids)) - np.repeat(starts, lengths)
        is_pair = lengths >= SHORTEST_PAIR
        return starts[is_pair], lengths[is_pair]

    def _coupled(self, row: Places, rows: int) -> tuple[Places, Places, Places]:
        """Of each pair its number in its row, that of its couple, and its partner's among all pairs.

        The first half of a row's pairs are coupled with the second half. Who has no partner is its own.
        """
        in_row = np.bincount(row, minlength=rows)
        slot = np.arange(len(row)) - (np.cumsum(in_row) - in_row)[row]
        couples = in_row[row] // 2 if self._exchanges else np.zeros_like(row)
        is_first, is_alone = slot < couples, slot >= 2 * couples
        to_partner = np.where(is_first, couples, np.where(is_alone, 0, -couples))
        return slot, np.where(is_first, slot, slot - couples), np.arange(len(row)) + to_partner


def _copy(ids: NDArray[np.int32], sources: Places, targets: Places, lengths: Places) -> None:
    """Copy runs of tokens to other places, all at once: a run may be copied to where another is copied from."""
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    ids[np.repeat(targets, lengths) + within] = ids[np.repeat(sources, lengths) + within]
