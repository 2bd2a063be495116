"""Packs documents into full rows: one line of tokens, cut every `row_tokens`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(
    pieces: Sequence[NDArray[np.integer]], rows: int, row_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lay pieces of documents end to end and cut the line into rows. Returns ids and position ids, both (rows, tokens).

    `pieces` are not empty and hold rows × row_tokens tokens in all. Position ids restart at 0 at every piece and at
    every row, as a document that is cut by a row's end goes on as one of its own: this is how the model knows
    documents apart.
    """
    total = rows * row_tokens
    ids = np.empty(total, np.int32)
    np.concatenate(pieces, out=ids, casting="same_kind")
    piece_ends = np.cumsum([len(piece) for piece in pieces])
    assert piece_ends[-1] == total
    is_start = np.zeros(total, np.bool_)
    is_start[::row_tokens] = True
    is_start[piece_ends[:-1]] = True
    starts = np.flatnonzero(is_start)
    # Position ids grow by one everywhere but at a start, where they fall back to 0: sum up the changes.
    position_ids = np.ones(total, np.int32)
    position_ids[0] = 0
    position_ids[starts[1:]] = 1 - np.diff(starts)
    np.cumsum(position_ids, out=position_ids)
    return ids.reshape(rows, row_tokens), position_ids.reshape(rows, row_tokens)
