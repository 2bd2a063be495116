"""A lane: one of the run's logical readers. It hands out the tokens of its documents in order, without end.

Its whole state is a cursor, (epoch, document position in the lane, token offset in that document): everything else is
looked up from it. A lane runs on into the next epoch, so no lane ever runs dry before another.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dstrain.data.order import Order
from dstrain.data.shards import BadSample, Corpus, OpenShard, TokenIds
from dstrain.errors import CorpusError

Cursor = tuple[int, int, int]  # epoch, document position, token offset
OnBadSample = Literal["stop", "skip"]

NO_TOKENS: TokenIds = np.empty(0, np.int32)


@dataclass(frozen=True)
class _Window:
    """A window's documents in reading order.

    The columns are memoryviews of int64: taking one number out is twice as fast as from an array. For token shards
    `starts` and `lengths` are in tokens; for text, `starts` number samples.
    """

    epoch: int
    first: int  # document position in the lane
    shards: memoryview
    starts: memoryview
    lengths: memoryview


class Lane:
    """Reads one lane from `cursor` on."""

    def __init__(self, lane: int, corpus: Corpus, order: Order, cursor: Cursor, on_bad_sample: OnBadSample) -> None:
        self._lane, self._corpus, self._order = lane, corpus, order
        self._is_tokens = corpus.kind == "tokens"
        self._on_bad_sample = on_bad_sample
        if not 0 <= cursor[1] < order.lane_documents(lane):
            raise self._foreign_cursor(cursor)
        self.cursor = cursor
        self.bad_samples: list[str] = []  # met since the caller last emptied it
        self._window: _Window | None = None
        self._open: tuple[int, OpenShard] | None = None  # the shard read last: mostly that of the next document, too
        self._text_tokens: tuple[tuple[int, int], TokenIds] | None = None  # (epoch, position) → a text split over rows

    def read(self, tokens: int) -> list[TokenIds]:
        """The next `tokens` tokens as pieces of documents, none of them empty. Advances the cursor.

        Raises CorpusError for a bad sample when these stop the run, or when a whole epoch of the lane has no token.
        """
        epoch, position, offset = self.cursor
        lane_documents = self._order.lane_documents(self._lane)
        documents_without_tokens = 0
        pieces = []
        while tokens > 0:
            document = self._document(epoch, position)
            rest = len(document) - offset
            if rest > tokens:
                pieces.append(document[offset : offset + tokens])
                offset += tokens
                break
            if rest > 0:
                pieces.append(document[offset:] if offset else document)
                tokens -= rest
                documents_without_tokens = 0
            elif rest == 0:
                documents_without_tokens += 1
                if documents_without_tokens == 2 * lane_documents:  # a whole epoch, wherever the count began
                    raise CorpusError(
                        f"lane {self._lane}: none of its {lane_documents} documents of epoch {epoch} has a token; "
                        "use fewer data.lanes, or a corpus without empty documents"
                    )
            else:
                raise self._foreign_cursor((epoch, position, offset))
            position, offset = position + 1, 0
            if position == lane_documents:
                epoch, position = epoch + 1, 0
        self.cursor = epoch, position, offset
        return pieces

    def _foreign_cursor(self, cursor: Cursor) -> CorpusError:
        return CorpusError(
            f"lane {self._lane}: there is no token at cursor {cursor}; the cursor is of another corpus, tokenizer "
            "or data.lanes: "
            "resume with the data that the run was started with"
        )

    def _document(self, epoch: int, position: int) -> TokenIds:
        """The tokens of the document at a position; none if it is bad and skipped."""
        window = self._window
        if window is None or epoch != window.epoch or not 0 <= position - window.first < len(window.starts):
            window = self._window = self._load(epoch, position)
        place = position - window.first
        shard = window.shards[place]
        if self._open is None or self._open[0] != shard:
            self._open = shard, self._corpus.shard(shard)
        opened, start = self._open[1], window.starts[place]
        if self._is_tokens:
            return opened.ids[start : start + window.lengths[place]]
        return self._text(epoch, position, opened, start)

    def _text(self, epoch: int, position: int, opened: OpenShard, sample: int) -> TokenIds:
        if self._text_tokens is not None and self._text_tokens[0] == (epoch, position):
            return self._text_tokens[1]
        try:
            tokens = self._corpus.encode_document(opened, sample)
        except BadSample as bad:
            if self._on_bad_sample == "stop":
                raise CorpusError(
                    f"{bad}; repair or remove the sample, or set data.on_bad_sample: skip to count and skip such "
                    "samples"
                ) from bad
            self.bad_samples.append(str(bad))
            tokens = NO_TOKENS
        self._text_tokens = (epoch, position), tokens
        return tokens

    def _load(self, epoch: int, position: int) -> _Window:
        """Look up all documents of the window around a position at once."""
        number, place = self._order.window_of(position)
        shards, starts, lengths = [], [], []
        for shard, first, last in self._order.runs(epoch, self._lane, number):
            if self._is_tokens:
                run_starts, run_lengths = self._corpus.shard(shard).token_spans(first, last)
            else:
                run_starts, run_lengths = np.arange(first, last), np.zeros(last - first, np.int64)
            shards.append(np.full(last - first, shard))
            starts.append(run_starts)
            lengths.append(run_lengths)
        shuffle = self._order.shuffle(epoch, self._lane, number)
        columns = (np.concatenate(column)[shuffle].data for column in (shards, starts, lengths))
        return _Window(epoch, position - place, *columns)
