"""Documents → packed and masked batches, for the libraries that the benchmark compares with: their work ends earlier.

What a practised user would write around them: vectorised numpy over the whole batch, the same outputs as this
project's stream (ids after masking, position ids, masked positions in order, labels), the same shares. No digest is
taken here; this project's stream takes one of every row, and its masks can be drawn again for any row, which the
plain generator here cannot.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 30_000
MASK_ID, FIRST_ORDINARY_ID = 4, 5  # ids 0 … 4 are special
CLS_ID, SEP_ID = 2, 3
REPLACE = (0.8, 0.1, 0.1)
NO_LABEL = -100


@dataclass(frozen=True)
class BatchShape:
    """What every contestant has to make."""

    rows: int
    row_tokens: int
    masking_rate: float


@dataclass(frozen=True)
class Batch:
    """What is handed to the model: ids and positions (rows, tokens), predictions (rows, masked per row)."""

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    masked_positions: NDArray[np.int64]
    labels: NDArray[np.int32]


def batches(documents: Iterator[NDArray[np.integer]], shape: BatchShape) -> Iterator[Batch]:
    """Full batches; documents are split at row ends."""
    rng = np.random.default_rng(0)
    batch_tokens = shape.rows * shape.row_tokens
    rest: NDArray[np.integer] = np.empty(0, np.uint16)
    while True:
        pieces, gathered = [rest], len(rest)
        while gathered < batch_tokens:
            document = next(documents)
            pieces.append(document)
            gathered += len(document)
        tokens = np.concatenate(pieces)
        rest = tokens[batch_tokens:]
        ids = tokens[:batch_tokens].astype(np.int32).reshape(shape.rows, shape.row_tokens)
        ends = np.cumsum([len(piece) for piece in pieces])
        positions = position_ids(ends[ends < batch_tokens], shape)
        masked_positions, labels = mask(ids, shape, rng)
        yield Batch(ids, positions, masked_positions, labels)


def batches_of_rows(rows: Iterator[NDArray[np.integer]], shape: BatchShape) -> Iterator[Batch]:
    """Batches of rows that are packed already; a document begins where [CLS] stands."""
    rng = np.random.default_rng(0)
    while True:
        ids = np.stack([next(rows) for _ in range(shape.rows)]).astype(np.int32)
        positions = position_ids(np.flatnonzero(ids.reshape(-1) == CLS_ID), shape)
        masked_positions, labels = mask(ids, shape, rng)
        yield Batch(ids, positions, masked_positions, labels)


def masked_batches(
    packed: Iterator[tuple[NDArray[np.integer], NDArray[np.integer]]], shape: BatchShape
) -> Iterator[Batch]:
    """Batches of ids and position ids (rows, tokens) that another program has packed."""
    rng = np.random.default_rng(0)
    for raw_ids, positions in packed:
        ids = raw_ids.astype(np.int32)
        masked_positions, labels = mask(ids, shape, rng)
        yield Batch(ids, positions.astype(np.int32, copy=False), masked_positions, labels)


def position_ids(document_starts: NDArray[np.int64], shape: BatchShape) -> NDArray[np.int32]:
    """(rows, tokens), restarting at every document and at every row."""
    is_start = np.zeros(shape.rows * shape.row_tokens, np.bool_)
    is_start[document_starts] = True
    is_start[:: shape.row_tokens] = True
    starts = np.flatnonzero(is_start)
    changes = np.ones(len(is_start), np.int32)
    changes[0] = 0
    changes[starts[1:]] = 1 - np.diff(starts)
    return np.cumsum(changes, dtype=np.int32).reshape(shape.rows, shape.row_tokens)


def mask(
    ids: NDArray[np.int32], shape: BatchShape, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Mask `ids` in place, a fixed number of ordinary tokens in each row. Returns positions in order, and labels."""
    count = max(1, round(shape.masking_rate * shape.row_tokens))
    noise = rng.random(ids.shape, dtype=np.float32)
    noise[ids < FIRST_ORDINARY_ID] = 2.0
    positions = np.sort(np.argpartition(noise, count - 1, axis=1)[:, :count], axis=1)
    original = np.take_along_axis(ids, positions, axis=1)
    labels = np.where(original < FIRST_ORDINARY_ID, np.int32(NO_LABEL), original)
    action = rng.random(positions.shape, dtype=np.float32)
    random_ids = rng.integers(FIRST_ORDINARY_ID, VOCAB_SIZE, positions.shape, dtype=np.int32)
    replacement = np.where(action < REPLACE[0], np.int32(MASK_ID), original)
    replacement = np.where((action >= REPLACE[0]) & (action < REPLACE[0] + REPLACE[1]), random_ids, replacement)
    np.put_along_axis(ids, positions, np.where(labels == NO_LABEL, original, replacement), axis=1)
    return positions, labels
