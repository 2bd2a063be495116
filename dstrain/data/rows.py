"""What one rank consumes in one global step, and how it lies in memory.

A step is one flat buffer, so that a background process can make it in shared memory and nothing is copied on the way:

    header    int64   digest (2), step
    sources   int32   one per row: the number of its source
    records   int32   one per row: row number (as int64), input_ids, masked_positions, labels, position_ids,
                      and the pairs where there are any (`pairs.py`)

A row's digest is the multilinear hash (Lemire and Kaser, "Strongly universal string hashing is fast", 2014) of its
record as little-endian 64-bit words, twice, with fixed odd keys, each finished by SplitMix64's mixer. A step's digest
is the sum of its rows' modulo 2**64 in each half. Sums commute, so ranks add theirs up in any order and get the
digest of the global batch, whatever the number of ranks. It guards against accidents, not against forgers: two
different steps agree with a chance of about 2**-64. A cryptographic hash of every row would add a third to the time
in which the rows are made.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import draws, mix64, stream_key

ROW_NUMBER_ITEMS = 2  # an int64 takes two int32
HEADER_ITEMS = 3


@dataclass(frozen=True)
class StepRows:
    """The rows of one rank and global step. The arrays are views that stay valid until the next step is asked for.

    R rows of L tokens, K of them predicted. Where a row has fewer than K tokens that may be masked, or the step masks
    fewer, its `labels` end in -100 and its `masked_positions` in 0. P is the most pairs of a row, 0 without pairs.
    """

    step: int
    row_numbers: NDArray[np.int64]  # (R,), increasing
    sources: NDArray[np.int32]  # (R,)
    input_ids: NDArray[np.int32]  # (R, L), after masking
    position_ids: NDArray[np.int32]  # (R, L), restarting at 0 at every slice of a document, and every pair
    masked_positions: NDArray[np.int32]  # (R, K), increasing
    labels: NDArray[np.int32]  # (R, K)
    pairs: NDArray[np.int32]  # (R, P, 4): where A begins, where B begins, where it has ended, label
    digest: NDArray[np.int64]  # (2,)


@dataclass(frozen=True)
class StepShape:
    """The sizes of a rank's step: `rows` × `row_tokens` with `masked` predictions each.

    `pairs` is the number of a row's slots for pairs, 0 without pairs.
    """

    rows: int
    row_tokens: int
    masked: int
    pairs: int = 0

    @property
    def record_items(self) -> int:
        """Length of a row's record, in int32: always even, so that every row number is aligned."""
        return ROW_NUMBER_ITEMS + 2 * self.row_tokens + 2 * self.masked + 4 * self.pairs

    @property
    def source_items(self) -> int:
        """Length of the sources, in int32: even, so that the records behind them are aligned."""
        return self.rows + self.rows % 2

    @property
    def bytes(self) -> int:
        """Size of a step's buffer."""
        return 8 * HEADER_ITEMS + 4 * (self.source_items + self.rows * self.record_items)


@cache
def digest_keys(words: int) -> NDArray[np.uint64]:
    """The keys of the multilinear hash, (words, 2): odd, so that a change of one word always shows."""
    keys: NDArray[np.uint64] = draws(stream_key("digest"), np.arange(2 * words, dtype=np.uint64)) | np.uint64(1)
    return keys.reshape(words, 2)


class Records:
    """Named views of the records in `items`, an int32 array (rows, `shape.record_items`)."""

    def __init__(self, shape: StepShape, items: NDArray[np.int32]) -> None:
        self.items = items
        ends = np.cumsum([ROW_NUMBER_ITEMS, shape.row_tokens, shape.masked, shape.masked, shape.row_tokens])
        row_number, self.input_ids, self.masked_positions, self.labels, self.position_ids, pairs = np.split(
            items, ends, axis=1
        )
        self.pairs = pairs.reshape(len(items), shape.pairs, 4)
        self.row_numbers = row_number.view(np.int64)[:, 0]
        self._digest_keys = digest_keys(shape.record_items // 2)

    def digest(self) -> NDArray[np.int64]:
        """The sum of the rows' digests, in two halves."""
        halves: NDArray[np.uint64] = mix64(self.items.view(np.uint64) @ self._digest_keys)  # (rows, 2)
        total: NDArray[np.uint64] = halves.sum(axis=0)
        return total.view(np.int64)


class StepBuffer:
    """One step laid out in `memory`, which must be writable and at least `shape.bytes` long."""

    def __init__(self, shape: StepShape, memory: memoryview | bytearray) -> None:
        header = np.frombuffer(memory, np.int64, HEADER_ITEMS)
        self.digest = header[:2]
        self.step = header[2:]
        self.sources = np.frombuffer(memory, np.int32, shape.rows, 8 * HEADER_ITEMS)
        records_first = 8 * HEADER_ITEMS + 4 * shape.source_items
        items = np.frombuffer(memory, np.int32, shape.rows * shape.record_items, records_first)
        self.records = Records(shape, items.reshape(shape.rows, shape.record_items))

    def rows(self) -> StepRows:
        """The step that was made here."""
        return StepRows(
            step=int(self.step[0]),
            row_numbers=self.records.row_numbers,
            sources=self.sources,
            input_ids=self.records.input_ids,
            position_ids=self.records.position_ids,
            masked_positions=self.records.masked_positions,
            labels=self.records.labels,
            pairs=self.records.pairs,
            digest=self.digest,
        )


def digest_hex(digest: NDArray[np.int64]) -> str:
    """A step's digest, summed over all ranks, as 32 hexadecimal digits."""
    return "".join(f"{half % 2**64:016x}" for half in digest.tolist())
