"""The order of an epoch: drawn from (seed, epoch), the same for any number of ranks, in batches of like length.

    examples ── shuffled ── runs of `groups` batches, each sorted by length ── their batches shuffled ─► order

Batches of like length need little padding. A batch that an epoch shares with the one before or after it is left as it
was drawn, and so every batch within is whole.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import permutation, stream_key


def epoch_order(seed: int, epoch: int, lengths: Sequence[int], batch_rows: int, groups: int) -> NDArray[np.int64]:
    """The order in which an epoch goes through its examples: each once.

    Args:
        seed: data.seed.
        epoch: from 0.
        lengths: tokens of each example.
        batch_rows: rows of a global batch.
        groups: global batches that are sorted together.
    """
    count = len(lengths)
    drawn = permutation(stream_key(seed, "examples", epoch), count)
    head = min(-epoch * count % batch_rows, count)  # rows that fill up the batch begun in the epoch before
    whole = (count - head) // batch_rows
    middle = drawn[head : head + whole * batch_rows]
    sizes = np.asarray(lengths)[middle]
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(middle), groups * batch_rows):
        run = middle[start : start + groups * batch_rows]
        ordered = run[np.argsort(sizes[start : start + len(run)], kind="stable")]
        batches.extend(ordered.reshape(-1, batch_rows))
    shuffled = [batches[index] for index in permutation(stream_key(seed, "batches", epoch), whole)]
    return np.concatenate([drawn[:head], *shuffled, drawn[head + whole * batch_rows :]])
