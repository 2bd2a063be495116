"""A corpus as one line of tokens, of which any stretch is read at once from memory-mapped tars.

The documents of all shards, special tokens in, laid end to end in the order of the shards are the *line*; a place on
it is a number of tokens. A `Corpus` holds a few numbers per shard. What a shard's documents are and where they lie
is loaded when it is first touched, and a bounded number of shards is kept open, so that neither memory nor file
descriptors grow with the corpus.
"""

import resource
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dstrain.data.index import TYPES, Kind
from dstrain.data.locate import Located, locate
from dstrain.data.mapped import BadSample, MappedShard
from dstrain.data.tokens import DocumentTokenizer

TokenIds = NDArray[np.integer]

DEFAULT_TEXT_FIELD = "text"
OPEN_SHARDS = 512
OPEN_BYTES = 1 << 28  # of the open shards' indexes
DESCRIPTORS_FOR_OTHERS = 128  # what the rest of the process may need of the limit on open files

__all__ = ["DEFAULT_TEXT_FIELD", "BadSample", "Corpus", "DocumentPlace", "OpenShard", "Slices", "TokenIds"]


@dataclass(frozen=True)
class Slices:
    """Slices of documents, in columns of N: `length` tokens from `start` of a shard on. None is empty.

    `start` counts, in a token shard, ids of `OpenShard.ids`; in a text shard, tokens of the shard. `OpenShard.read`
    takes either.
    """

    shard: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]


@dataclass(frozen=True)
class DocumentPlace:
    """Which document a token belongs to, and where in it the token is.

    `number` counts documents within a sample that holds several, and is None otherwise. `offset` is the token's place
    in its document, `tokens` the document's length, `first` the place of its first token on the corpus' line.
    """

    shard: Path
    key: str
    number: int | None
    offset: int
    tokens: int
    first: int


class Corpus:
    """All documents of a location. Open one with `Corpus.open`."""

    def __init__(self, located: Located, text_field: str, tokenizer: DocumentTokenizer | None) -> None:
        self._located = located
        self._text_field = text_field
        self._tokenizer = tokenizer
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._open_limit = OPEN_SHARDS
        self._open_bytes = 0
        table = located.table
        self.kind: Kind = "text" if TYPES[int(table.types[0])] is None else "tokens"
        self.tokenizer_digest = located.tokenizer
        self.digest = table.digest
        self.document_counts = table.documents
        self.total_documents = int(table.documents.sum())
        self._firsts = np.concatenate([[0], np.cumsum(table.tokens)])  # of each shard, its first token on the line
        self.largest_id = int(table.max_ids.max())

    @classmethod
    def open(
        cls,
        location: str,
        *,
        text_field: str = DEFAULT_TEXT_FIELD,
        tokenizer: DocumentTokenizer | None = None,
    ) -> "Corpus":
        """Open a folder, a glob or a brace pattern of tar shards. Raises CorpusError."""
        return cls(locate(location), text_field, tokenizer)

    @property
    def total_tokens(self) -> int:
        """The tokens of all documents, special tokens in: the length of the line."""
        return int(self._firsts[-1])

    def slices(self, first: int, last: int) -> Slices:
        """The tokens first … last-1 of the line as slices of documents in natural order.

        The bytes that hold them are checked at their first touch. Raises CorpusError naming the shard and the block of
        bytes that is not what was indexed.
        """
        assert 0 <= first < last <= self.total_tokens, f"tokens {first} to {last} of {self.total_tokens}"
        number = int(np.searchsorted(self._firsts, first, "right")) - 1
        shards, starts, lengths = [], [], []
        while first < last:
            start, stop = int(self._firsts[number]), min(last, int(self._firsts[number + 1]))
            if first < stop:
                shard_starts, shard_lengths = self.shard(number).slices(first - start, stop - start)
                shards.append(np.full(len(shard_starts), number))
                starts.append(shard_starts)
                lengths.append(shard_lengths)
                first = stop
            number += 1
        if len(shards) == 1:
            return Slices(shards[0], starts[0], lengths[0])
        return Slices(np.concatenate(shards), np.concatenate(starts), np.concatenate(lengths))

    def shard_path(self, number: int) -> Path:
        """Where a shard lies, for messages."""
        return self._located.path(number)

    def keep_open(self, shards: int) -> None:
        """Allow for this many shards in use at a time, as far as the limit on open files lets us."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = shards + DESCRIPTORS_FOR_OTHERS
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
        self._open_limit = max(allowed - DESCRIPTORS_FOR_OTHERS, 16)

    def shard(self, number: int) -> "OpenShard":
        """A shard, mapped; the least recently used one is let go when there are too many."""
        opened = self._open.get(number)
        if opened is not None:
            self._open.move_to_end(number)
            return opened
        opened = self._open[number] = self._open_shard(number)
        self._open_bytes += opened.memory_bytes
        while len(self._open) > self._open_limit or (self._open_bytes > OPEN_BYTES and len(self._open) > 1):
            _, oldest = self._open.popitem(last=False)  # its map goes when the last array that looks into it goes
            self._open_bytes -= oldest.memory_bytes
        return opened

    def _open_shard(self, number: int) -> "OpenShard":
        return TokenShard(MappedShard(self._located[number]))


class OpenShard(ABC):
    """One mapped shard with the places of its documents."""

    def __init__(self, mapped: MappedShard) -> None:
        self.mapped = mapped

    @property
    def ids(self) -> TokenIds:
        """Of a token shard, the whole tar as ids, of which only what `slices` named was checked."""
        raise AssertionError("a text shard has no ids: read them")

    @property
    def memory_bytes(self) -> int:
        """What this takes of the process' own memory."""
        return self.mapped.memory_bytes

    @abstractmethod
    def slices(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The starts and lengths of the slices that hold the tokens first … last-1 of this shard, checked."""

    @abstractmethod
    def read(self, start: int, length: int) -> TokenIds:
        """The ids of a slice, which may span documents of one block. Raises CorpusError for damaged bytes."""


class TokenShard(OpenShard):
    """A shard of blocks of ids: documents are views of the map."""

    def __init__(self, mapped: MappedShard) -> None:
        super().__init__(mapped)
        columns = mapped.columns
        assert mapped.located.summary.dtype is not None
        dtype: np.dtype[np.integer] = np.dtype(mapped.located.summary.dtype)
        self._ids = mapped.as_array(dtype)
        self._itemsize = dtype.itemsize
        self._block_starts = columns["ids_offset"] // self._itemsize  # in `ids`
        self._first_tokens = np.concatenate([[0], np.cumsum(columns["block_tokens"])])
        self._first_documents = np.concatenate([[0], np.cumsum(columns["block_documents"])])

    @property
    def ids(self) -> TokenIds:
        return self._ids

    def slices(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        block = int(np.searchsorted(self._first_tokens, first, "right")) - 1
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
        ends = self.ends(block)
        start = int(self._block_starts[block])
        self.mapped.check((start + first) * self._itemsize, (start + last) * self._itemsize)
        edges = ends[np.searchsorted(ends, first, "right") : np.searchsorted(ends, last, "left")]
        edges = np.concatenate([[first], edges, [last]])
        lengths = np.diff(edges)
        starts = edges[:-1] + start
        if lengths.all():
            return starts, lengths
        return starts[lengths > 0], lengths[lengths > 0]

    def ends(self, block: int) -> NDArray[np.int64]:
        """Where each document of a block ends, in tokens of the block."""
        columns = self.mapped.columns
        return self.mapped.int64_at(int(columns["ends_offset"][block]), int(columns["block_documents"][block]))

    def read(self, start: int, length: int) -> TokenIds:
        self.mapped.check(start * self._itemsize, (start + length) * self._itemsize)
        return self._ids[start : start + length]
