"""The order of an epoch, for any position at once: no shuffle buffer, so nothing must be replayed to get there.

    epoch     the shards in an order drawn from (seed, epoch); their documents laid end to end are the epoch's line
    lane      one of `lanes` equal ranges of that line, so every document belongs to exactly one lane
    window    a lane's range in pieces of `window` documents, each in an order drawn from (seed, epoch, lane, window)

Opening a window costs the same wherever it lies: a binary search over shards and a permutation of one window.
"""

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dstrain.data.counter_rng import permutation, stream_key
from dstrain.errors import CorpusError

EPOCHS_KEPT = 3  # lanes cross the end of an epoch at different times


class Order:
    """(epoch, lane, window) → documents. Of the corpus it depends on the number of documents in each shard only."""

    def __init__(self, document_counts: NDArray[np.int64], lanes: int, seed: int, window: int, purpose: str) -> None:
        """`document_counts` has one entry per shard; `purpose` keeps the orders of training and validation apart.

        Raises CorpusError when there are fewer documents than lanes.
        """
        self._counts = document_counts
        self._total = int(document_counts.sum())
        self._lanes, self._seed, self._window, self._purpose = lanes, seed, window, purpose
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        if self._total < lanes:
            fitting = max((n for n in range(1, self._total + 1) if lanes % n == 0), default=0)
            remedy = f"use data.lanes={fitting}, or more documents" if fitting else "give a corpus with documents"
            raise CorpusError(
                f"data.lanes={lanes}, but the {purpose} corpus has {self._total} documents; each lane needs one: "
                f"{remedy}"
            )

    def lane_documents(self, lane: int) -> int:
        """How many documents of an epoch belong to a lane."""
        return (lane + 1) * self._total // self._lanes - lane * self._total // self._lanes

    def window_of(self, position: int) -> tuple[int, int]:
        """Which window of its lane a document position lies in, and where in that window."""
        return divmod(position, self._window)

    def runs(self, epoch: int, lane: int, window: int) -> Iterator[tuple[int, int, int]]:
        """A window's documents before they are shuffled: (shard, first document, last document + 1), along the line."""
        shards, starts = self._epoch(epoch)
        lane_start = lane * self._total // self._lanes
        line = lane_start + window * self._window
        stop = min(line + self._window, lane_start + self.lane_documents(lane))
        place = int(np.searchsorted(starts, line, "right")) - 1
        while line < stop:
            run_stop = min(stop, int(starts[place + 1]))
            if run_stop > line:
                yield int(shards[place]), line - int(starts[place]), run_stop - int(starts[place])
            line, place = run_stop, place + 1

    def shuffle(self, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        """The order in which a window's documents are read: indices into its concatenated runs."""
        length = min(self._window, self.lane_documents(lane) - window * self._window)
        return permutation(stream_key(self._seed, self._purpose, "window", epoch, lane, window), length)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in the epoch's order, and where each starts on the line (one more entry: the line's end)."""
        cached = self._epochs.get(epoch)
        if cached is None:
            shards = permutation(stream_key(self._seed, self._purpose, "shards", epoch), len(self._counts))
            cached = shards, np.concatenate([[0], np.cumsum(self._counts[shards])])
            self._epochs[epoch] = cached
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return cached
