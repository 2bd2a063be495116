"""One shard in tokens: which documents a stretch of its tokens holds, and their ids.

A token shard is read as it lies in its file; a text shard is tokenized, and then kept for a while, for a document that
is cut at the end of a row is read again for the next.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dstrain.data.counts import TokenCounter, TokenCounts
from dstrain.data.mapped import BadSample, MappedShard
from dstrain.data.tokens import segments
from dstrain.errors import CorpusError

TokenIds = NDArray[np.integer]

CACHED_TOKENS = 1 << 22  # of texts read last, over all shards of a corpus


class OpenShard(ABC):
    """A mapped shard as blocks of documents. Its documents and their tokens are numbered from 0 in natural order.

    A *start* is where a slice of a document begins: in a token shard a place in its file, counted in ids, in a text
    shard the number of a token.
    """

    def __init__(
        self,
        mapped: MappedShard,
        block_starts: NDArray[np.int64],
        block_tokens: NDArray[np.int64],
        block_documents: NDArray[np.int64],
    ) -> None:
        """Take a map of the shard and, per block, the start of its first document and how much it holds."""
        self.mapped = mapped
        self._block_starts, self._block_tokens = block_starts, block_tokens
        self._first_tokens = np.concatenate([[0], np.cumsum(block_tokens)])
        self._first_documents = np.concatenate([[0], np.cumsum(block_documents)])

    @property
    def memory_bytes(self) -> int:
        """What this takes of the process' own memory."""
        return self.mapped.memory_bytes

    @abstractmethod
    def read(self, start: int, length: int) -> TokenIds:
        """The ids of a slice. Raises CorpusError for bytes, or numbers of tokens, that are not what was indexed."""

    @abstractmethod
    def sample(self, document: int) -> tuple[str, int | None]:
        """The key of the sample that holds a document, and of a sample that holds several, the document's number."""

    @abstractmethod
    def documents_of(self, key: str) -> range:
        """The documents of a sample, none where there is no such sample."""

    @abstractmethod
    def _ends(self, block: int) -> NDArray[np.int64]:
        """Where each document of a block ends, in tokens of the block."""

    def slices(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The starts and lengths of the documents' slices that hold the tokens first … last-1, none of them empty.

        What says where documents end is checked here, the documents when they are read. Raises CorpusError.
        """
        block = _holder(self._first_tokens, first)
        starts, lengths = [], []
        while first < last:
            block_first, stop = int(self._first_tokens[block]), min(last, int(self._first_tokens[block + 1]))
            if first < stop:
                block_starts, block_lengths = self._block_slices(block, first - block_first, stop - block_first)
                starts.append(block_starts)
                lengths.append(block_lengths)
                first = stop
            block += 1
        return (starts[0], lengths[0]) if len(starts) == 1 else (np.concatenate(starts), np.concatenate(lengths))

    def _block_slices(self, block: int, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ends = self._ends(block)
        low, high = ends.searchsorted(first, "right"), ends.searchsorted(last, "left")
        edges = np.empty(high - low + 2, np.int64)
        edges[0], edges[1:-1], edges[-1] = first, ends[low:high], last
        lengths = edges[1:] - edges[:-1]
        starts = edges[:-1] + self._block_starts[block]
        return (starts, lengths) if lengths.all() else (starts[lengths > 0], lengths[lengths > 0])

    def token_at(self, start: int) -> int:
        """The number of the token at a start."""
        inside = start - self._block_starts
        block = int(np.flatnonzero((inside >= 0) & (inside < self._block_tokens))[0])
        return int(inside[block] + self._first_tokens[block])

    def document_at(self, token: int) -> int:
        """Which document the token of a number belongs to."""
        block = _holder(self._first_tokens, token)
        inside = np.searchsorted(self._ends(block), token - int(self._first_tokens[block]), "right")
        return int(self._first_documents[block]) + int(inside)

    def document_span(self, document: int) -> tuple[int, int]:
        """The numbers of a document's first token and of the one after its last."""
        block = _holder(self._first_documents, document)
        inside = document - int(self._first_documents[block])
        ends, first = self._ends(block), int(self._first_tokens[block])
        return first + (int(ends[inside - 1]) if inside else 0), first + int(ends[inside])

    def documents_with(self, tokens: int) -> Iterator[int]:
        """The documents of a number of tokens."""
        for block, first in enumerate(self._first_documents[:-1].tolist()):
            yield from (first + np.flatnonzero(np.diff(self._ends(block), prepend=0) == tokens)).tolist()

    def read_document(self, document: int) -> TokenIds:
        """All ids of a document. Raises CorpusError as `read` does."""
        first, last = self.document_span(document)
        if first == last:
            return np.empty(0, np.int32)
        starts, lengths = self.slices(first, last)
        return self.read(int(starts[0]), int(lengths[0]))


class TokenShard(OpenShard):
    """A shard of blocks of ids, each a sample: documents are views of the map."""

    def __init__(self, mapped: MappedShard) -> None:
        columns, dtype_name = mapped.columns, mapped.located.summary.dtype
        assert dtype_name is not None
        dtype: np.dtype[np.integer] = np.dtype(dtype_name)
        self._ids, self._itemsize = mapped.as_array(dtype), dtype.itemsize
        self._block_documents, self._ends_offsets = columns["block_documents"], columns["ends_offset"]
        starts = columns["ids_offset"] // self._itemsize
        self._checked, self._block_ids = mapped.checked, mapped.block_bytes // self._itemsize
        super().__init__(mapped, starts, columns["block_tokens"], self._block_documents)

    def read(self, start: int, length: int) -> TokenIds:
        """A view of the map. On the hot path: asks for a check only where a block was not checked yet."""
        stop = start + length
        if self._checked.find(0, start // self._block_ids, (stop - 1) // self._block_ids + 1) >= 0:
            self.mapped.check(start * self._itemsize, stop * self._itemsize)
        return self._ids[start:stop]

    def sample(self, document: int) -> tuple[str, int | None]:
        """The block's key, and the document's number in it."""
        block = _holder(self._first_documents, document)
        return self.mapped.keys[block], document - int(self._first_documents[block])

    def documents_of(self, key: str) -> range:
        """All documents of a block."""
        keys = self.mapped.keys
        if key not in keys:
            return range(0)
        block = keys.index(key)
        return range(int(self._first_documents[block]), int(self._first_documents[block + 1]))

    def _ends(self, block: int) -> NDArray[np.int64]:
        return self.mapped.int64_at(int(self._ends_offsets[block]), int(self._block_documents[block]))


class TextCache:
    """The ids of the segments of texts that were read last."""

    def __init__(self) -> None:
        self._segments: OrderedDict[tuple[int, int, int], TokenIds] = OrderedDict()
        self._tokens = 0
        self.long_text: tuple[tuple[int, int], list[str]] | None = None
        """The segments of the long JSON text that was read last, by (shard, document): it is parsed as a whole."""

    def get(self, key: tuple[int, int, int]) -> TokenIds | None:
        """The ids of (shard, document, segment), if they are here."""
        ids = self._segments.get(key)
        if ids is not None:
            self._segments.move_to_end(key)
        return ids

    def put(self, key: tuple[int, int, int], ids: TokenIds) -> None:
        """Keep ids for a while."""
        self._segments[key] = ids
        self._tokens += len(ids)
        while self._tokens > CACHED_TOKENS:
            self._tokens -= len(self._segments.popitem(last=False)[1])


class TextShard(OpenShard):
    """A shard of texts whose tokens were counted, as one block. Each sample is a document."""

    def __init__(
        self,
        mapped: MappedShard,
        number: int,
        counter: TokenCounter,
        counts: TokenCounts,
        cache: TextCache,
    ) -> None:
        self._number, self._counter, self._cache = number, counter, cache
        self.counts, self._document_ends = counts, np.cumsum(counts.tokens)
        tokens, documents = counts.tokens.sum(keepdims=True), np.array([len(counts.tokens)])
        super().__init__(mapped, np.zeros(1, np.int64), tokens, documents)

    @property
    def memory_bytes(self) -> int:
        """What this takes of the process' own memory."""
        return super().memory_bytes + 2 * self._document_ends.nbytes

    def read(self, start: int, length: int) -> TokenIds:
        """Tokenize the segments of a document that hold the slice, or take them from the cache."""
        document = self.document_at(start)
        first = start - self.document_span(document)[0]
        last = first + length
        long = self.counts.long.of(document)
        tokens = self.counts.tokens[document : document + 1] if long is None else long[0]
        ends = np.cumsum(tokens)
        assert last <= ends[-1], "a slice is of one document"
        parts = []
        for segment in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1):
            before = int(ends[segment] - tokens[segment])
            parts.append(self._segment(document, segment)[max(first - before, 0) : last - before])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def sample(self, document: int) -> tuple[str, int | None]:
        """The sample's key."""
        return self.mapped.keys[document], None

    def documents_of(self, key: str) -> range:
        """The one document of a sample."""
        keys = self.mapped.keys
        return range(keys.index(key), keys.index(key) + 1) if key in keys else range(0)

    def _ends(self, block: int) -> NDArray[np.int64]:
        return self._document_ends

    def _segment(self, document: int, segment: int) -> TokenIds:
        """The ids of a document's segment, with the special tokens that stand at an end of the document."""
        key = (self._number, document, segment)
        ids = self._cache.get(key)
        if ids is None:
            try:
                ids = self._tokenize(document, segment)
            except BadSample as error:
                raise self._disagreement(document, str(error)) from error
            self._cache.put(key, ids)
        return ids

    def _tokenize(self, document: int, segment: int) -> TokenIds:
        long = self.counts.long.of(document)
        if long is None:
            expected, is_last = self.counts.tokens[document], True
            text = self.mapped.text(document, self._counter.text_field)
        else:
            tokens, sizes = long
            expected, is_last = tokens[segment], segment == len(tokens) - 1
            text = self._segment_text(document, segment, sizes)
        tokenizer = self._counter.tokenizer
        parts = [np.array(tokenizer.begin if segment == 0 else (), np.int32)]
        parts.append(tokenizer.encode_segment(text))
        parts.append(np.array([tokenizer.sep_id] if is_last else [], np.int32))
        ids = np.concatenate(parts)
        if len(ids) != expected:
            raise self._disagreement(document, f"{len(ids)} tokens, but {expected} were counted")
        return ids

    def _segment_text(self, document: int, segment: int, sizes: NDArray[np.int64]) -> str:
        """A segment of a long text: of a `.txt` without a look at the rest of it."""
        span = self.mapped.text_span(document)
        if span is not None:
            first = int(sizes[:segment].sum())
            raw = self.mapped.bytes_at(span[0] + first, min(int(sizes[segment]), span[1] - first))
            return raw.decode("utf-8", "replace")  # what is not UTF-8 has another number of tokens, or was not counted
        if self._cache.long_text is None or self._cache.long_text[0] != (self._number, document):
            parts = list(segments(self.mapped.text(document, self._counter.text_field)))
            self._cache.long_text = (self._number, document), parts
        parts = self._cache.long_text[1]
        return parts[segment] if segment < len(parts) else ""

    def _disagreement(self, document: int, reason: str) -> CorpusError:
        return CorpusError(
            f"{self.mapped.path}: sample {self.mapped.keys[document]!r} is not what was counted ({reason}): the "
            f"tokenizers library may have changed; {self._counter.remedy(self.mapped)}"
        )


def _holder(firsts: NDArray[np.int64], number: int) -> int:
    """Which of the stretches that begin at `firsts` holds a number: the last that begins there or before."""
    return int(firsts.searchsorted(number, "right")) - 1
