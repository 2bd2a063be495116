"""A corpus of shards from which any document can be read at once: a slice of the memory-mapped tar.

A `Corpus` holds one line per shard. What a shard's documents are and where they lie is loaded when a lane first
touches it, and a bounded number of shards is kept open, so neither memory nor file descriptors grow with the corpus.
"""

import json
import mmap
import resource
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dstrain.data.index import REINDEX, Kind, ShardIndex, corpus_digest, read_shard_index, total_tokens
from dstrain.data.locate import LocatedShard, locate, scan_and_keep
from dstrain.errors import CorpusError

Encode = Callable[
    [str], NDArray[np.int32]
]  # a text → its token ids with the special tokens around them; none for an empty text
TokenIds = NDArray[np.integer]

DEFAULT_TEXT_FIELD = "text"
FIELDS_SHOWN = 8
OPEN_SHARDS = 512
DESCRIPTORS_FOR_OTHERS = 128  # what the rest of the process may need of the limit on open files


class BadSample(Exception):
    """A sample that cannot be read as a document. The lane decides whether that stops the run or is counted."""

    def __init__(self, shard: Path, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key!r}: {reason}")


class Corpus:
    """All documents of a location, numbered within their shards. Open one with `Corpus.open`."""

    def __init__(
        self, shards: tuple[LocatedShard, ...], tokenizer: str | None, text_field: str, encode: Encode | None
    ) -> None:
        self._shards = shards
        self._text_field = text_field
        self._encode = encode
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._open_limit = OPEN_SHARDS
        summaries = [shard.summary for shard in shards]
        self.kind: Kind = summaries[0].kind
        self.tokenizer_digest = tokenizer
        self.digest = corpus_digest(summaries)
        self.document_counts = np.array([summary.documents for summary in summaries], np.int64)
        self.total_documents = int(self.document_counts.sum())
        self.total_tokens = total_tokens(summaries)
        self.largest_id = max((summary.max_id or 0) for summary in summaries)

    @classmethod
    def open(cls, location: str, *, text_field: str = DEFAULT_TEXT_FIELD, encode: Encode | None = None) -> "Corpus":
        """Open a folder, a glob or a brace pattern of tar shards.

        `text_field` names the document in `.json` samples; where a sample has a `.txt` file as well, the field wins if
        it is there. `encode` turns a text into token ids; without it, text is only read as text. Raises CorpusError.
        """
        located = locate(location)
        return cls(located.shards, located.tokenizer, text_field, encode)

    def shard_path(self, shard: int) -> Path:
        """Where a shard lies, for messages."""
        return self._shards[shard].path

    def keep_open(self, shards: int) -> None:
        """Allow for this many shards in use at a time, as far as the limit on open files lets us."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = shards + DESCRIPTORS_FOR_OTHERS
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
        self._open_limit = max(allowed - DESCRIPTORS_FOR_OTHERS, 16)

    def shard(self, shard: int) -> "OpenShard":
        """A shard, mapped; the least recently used one is let go when there are too many."""
        opened = self._open.get(shard)
        if opened is None:
            opened = self._open[shard] = OpenShard(self._shards[shard], self._text_field)
            if len(self._open) > self._open_limit:
                self._open.popitem(last=False)  # its map goes when the last array that looks into it goes
        else:
            self._open.move_to_end(shard)
        return opened

    def document(self, shard: int, document: int) -> TokenIds:
        """The token ids of one document, specials included: a view of the map for token shards. Raises BadSample."""
        opened = self.shard(shard)
        if self.kind == "tokens":
            starts, lengths = opened.token_spans(document, document + 1)
            return opened.ids[starts[0] : starts[0] + lengths[0]]
        return self.encode_document(opened, document)

    def encode_document(self, opened: "OpenShard", document: int) -> TokenIds:
        """Tokenize one document of a text shard. Raises BadSample."""
        assert self._encode is not None, "a text corpus opened without `encode`"
        return self._encode(opened.text(document))


class OpenShard:
    """One mapped shard with the places of its documents."""

    def __init__(self, located: LocatedShard, text_field: str) -> None:
        self._located = located
        self._text_field = text_field
        self._columns = _index_of(located).columns
        with located.path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._mapped) != located.summary.bytes:
            raise CorpusError(
                f"{located.path}: {len(self._mapped)} bytes, but its index expects {located.summary.bytes}: the "
                "shard was changed "
                f"while in use; copy it again, or {REINDEX} if the change is meant"
            )
        if located.summary.kind == "tokens":
            item = np.dtype(located.summary.dtype)
            # The whole tar as token ids; only the spans that the index names are meaningful.
            self.ids: TokenIds = np.frombuffer(self._mapped, item, len(self._mapped) // item.itemsize)
            self._block_starts = np.concatenate([[0], np.cumsum(self._columns["block_documents"])])

    def token_spans(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the documents first … last-1 lie in `ids`: starts and lengths, in tokens."""
        starts, lengths = [], []
        block = int(np.searchsorted(self._block_starts, first, "right")) - 1
        while first < last:
            block_first = int(self._block_starts[block])
            stop = min(last, int(self._block_starts[block + 1]))
            ends = np.frombuffer(
                self._mapped,
                np.int64,
                int(self._columns["block_documents"][block]),
                int(self._columns["ends_offset"][block]),
            )[max(first - block_first - 1, 0) : stop - block_first]
            before = ends[:-1] if first > block_first else np.concatenate([[0], ends[:-1]])
            ends = ends[1:] if first > block_first else ends
            starts.append(before + int(self._columns["ids_offset"][block]) // self.ids.itemsize)
            lengths.append(ends - before)
            first, block = stop, block + 1
        return np.concatenate(starts), np.concatenate(lengths)

    def text(self, document: int) -> str:
        """The text of one sample of a text shard. Raises BadSample."""
        txt_offset, txt_bytes, json_offset, json_bytes = (int(column[document]) for column in self._columns.values())
        if json_offset >= 0:
            content = self._json_object(document, json_offset, json_bytes)
            if isinstance(content.get(self._text_field), str):
                return str(content[self._text_field])
            if txt_offset < 0:
                problem = "is not a text" if self._text_field in content else "is missing"
                there = ", ".join(map(repr, list(content)[:FIELDS_SHOWN])) or "none"
                raise self._bad(document, f"its field {self._text_field!r} {problem} (fields: {there})")
        if txt_offset < 0:
            raise self._bad(document, "it has neither a .txt nor a .json file")
        try:
            return self._mapped[txt_offset : txt_offset + txt_bytes].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(document, f"not UTF-8 at byte {error.start} of the text") from error

    def _json_object(self, document: int, offset: int, size: int) -> dict[str, object]:
        try:
            content = json.loads(self._mapped[offset : offset + size].decode("utf-8"))
        except ValueError as error:  # of the JSON or of its UTF-8
            raise self._bad(document, f"not JSON ({error})") from error
        if not isinstance(content, dict):
            raise self._bad(document, f"its JSON is not an object with a field {self._text_field!r}")
        return content

    def _bad(self, document: int, reason: str) -> BadSample:
        return BadSample(self._located.path, self.key(document), reason)

    def sample(self, document: int) -> tuple[str, int | None]:
        """The key of the sample that holds a document, and of a sample that holds several, the document's number."""
        if self._located.summary.kind == "text":
            return self._keys[document], None
        block = int(np.searchsorted(self._block_starts, document, "right")) - 1
        return self._keys[block], document - int(self._block_starts[block])

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        return _index_of(self._located).keys

    def key(self, document: int) -> str:
        """The key of one sample of a text shard. Read again from the index: keys are for people, and take memory."""
        return _index_of(self._located).keys[document]


def _index_of(located: LocatedShard) -> ShardIndex:
    """A shard's index, which must be the one that the corpus was opened with."""
    if located.index is not None:
        return located.index
    try:
        index = read_shard_index(located.path)
    except FileNotFoundError:
        index, _ = scan_and_keep(located.path)
    if index.summary != located.summary:
        raise CorpusError(f"{located.path}: its own index and the folder's index.json disagree; {REINDEX}")
    return index
