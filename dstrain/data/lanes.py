"""Reads the lanes of one corpus: from a position of a lane's life to slices of documents, and to their tokens.

Nothing here is a state of the run: what is kept of a lane is the window that it reads, which is made anew from the
position alone wherever a run begins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dstrain.data.line import Line, Window, default_block_tokens, default_window_blocks
from dstrain.data.open_shard import OpenShard, TokenIds
from dstrain.data.shards import Corpus, Slices
from dstrain.data.spec import StreamSpec
from dstrain.errors import CorpusError


@dataclass
class _OpenWindow:
    """A window's slices in reading order, and how far it is read: slice `index` without its first `read` tokens.

    The columns are memoryviews: taking one number out is twice as fast as from an array. `ends` are where the slices
    end in the lane's life.
    """

    first: int  # positions of the lane's life
    last: int
    ends: NDArray[np.int64]
    shards: memoryview
    starts: memoryview
    lengths: memoryview
    position: int
    index: int = 0
    read: int = 0

    def seek(self, position: int) -> None:
        """Go to a position inside the window."""
        self.index = int(np.searchsorted(self.ends, position, "right"))
        self.read = position - (int(self.ends[self.index - 1]) if self.index else self.first)
        self.position = position


class SourceLanes:
    """All lanes of a corpus.

    Args:
        corpus: the documents.
        spec: of the stream that they are read for.

    Raises:
        CorpusError: there is not a token for each lane.
    """

    def __init__(self, corpus: Corpus, spec: StreamSpec) -> None:
        tokens, documents, lanes = corpus.total_tokens, corpus.total_documents, spec.lanes
        if tokens < lanes:
            remedy = f"use data.lanes={tokens} at most, or more text" if tokens else "give a corpus with text"
            raise CorpusError(
                f"data.lanes={lanes}, but the {spec.purpose} corpus has {tokens:,} tokens, and each lane needs one: "
                f"{remedy}"
            )
        self.corpus = corpus
        window_blocks = default_window_blocks(lanes) if spec.shuffle_window is None else spec.shuffle_window
        self.line = Line(
            tokens,
            lanes,
            (spec.seed, spec.purpose, corpus.digest),
            default_block_tokens(tokens, documents),
            window_blocks,
        )
        self._windows: dict[int, _OpenWindow] = {}
        self._read_last: tuple[int, OpenShard | None] = (-1, None)  # mostly that of the next slice, too

    def keep_open(self, lanes: int) -> None:
        """Allow for the shards that the windows of so many lanes lie in."""
        self.corpus.keep_open(lanes * (self.line.window_blocks + 1))

    def read(self, lane: int, position: int, tokens: int, slices: list[TokenIds]) -> None:
        """Append the tokens at positions `position` … `position + tokens - 1` of a lane's life, by documents.

        Raises:
            CorpusError: a shard cannot be read, or its bytes are not those that were indexed.
        """
        number, shard = self._read_last
        while tokens:
            window = self._windows.get(lane)
            if window is None or window.position != position or position == window.last:
                window = self._window(lane, position)
            index, read = window.index, window.read
            lengths, starts, shards, left = window.lengths, window.starts, window.shards, tokens
            for index in range(window.index, len(lengths)):
                if shards[index] != number:
                    number = shards[index]
                    shard = self.corpus.shard(number)
                assert shard is not None
                length = lengths[index] - read
                if length > left:
                    slices.append(shard.read(starts[index] + read, left))
                    read, left = read + left, 0
                    break
                slices.append(shard.read(starts[index] + read, length))
                left -= length
                read = 0
                if not left:
                    index += 1
                    break
            position += tokens - left
            window.index, window.read, window.position = index, read, position
            tokens = left
        self._read_last = number, shard

    def slices(self, lane: int, position: int, tokens: int) -> Slices:
        """The same as places: which part of which document stands there."""
        columns: list[tuple[int, int, int]] = []
        while tokens:
            window = self._window(lane, position)
            length = min(window.lengths[window.index] - window.read, tokens)
            columns.append((window.shards[window.index], window.starts[window.index] + window.read, length))
            position, tokens = position + length, tokens - length
            if position < window.last:
                window.seek(position)
        table = np.array(columns, np.int64).reshape(-1, 3)
        return Slices(table[:, 0], table[:, 1], table[:, 2])

    def window_slices(self, window: Window) -> tuple[Slices, NDArray[np.int64]]:
        """The slices of a window in the order in which they are read, and where each begins in the corpus' line."""
        parts = [self.corpus.slices(first, last) for first, last in window.ranges.tolist()]
        shards, starts, lengths = (
            np.concatenate([getattr(part, column) for part in parts]) for column in ("shard", "start", "length")
        )
        # Ranges laid end to end, and where each lies in the corpus' line instead.
        ends = np.cumsum(lengths)
        range_ends = np.cumsum(window.ranges[:, 1] - window.ranges[:, 0])
        moved = window.ranges[:, 1] - range_ends
        firsts = ends - lengths + np.repeat(moved, [len(part.length) for part in parts])
        order = self.line.shuffle(window, len(lengths))
        return Slices(shards[order], starts[order], lengths[order]), firsts[order]

    def _window(self, lane: int, position: int) -> _OpenWindow:
        """The window that a position of a lane's life is in, read up to there."""
        opened = self._windows.get(lane)
        if opened is None or not opened.first <= position < opened.last:
            window = self.line.window_at(lane, position)
            slices, _ = self.window_slices(window)
            opened = self._windows[lane] = _OpenWindow(
                window.life,
                window.life + window.tokens,
                window.life + np.cumsum(slices.length),
                slices.shard.data,
                slices.start.data,
                slices.length.data,
                window.life,
            )
        if opened.position != position:
            opened.seek(position)
        return opened
