"""One shard, mapped into memory: its bytes, each block of them checked before its first use, and its texts."""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dstrain.base.blocks import BlockDigests, DamagedBlockError, MappedFile
from dstrain.data.index import ShardIndex
from dstrain.data.index_file import index_remedy
from dstrain.data.locate import LocatedShard, changed_remedy, own_index, resized_shard, unreadable_shard
from dstrain.errors import CorpusError

FIELDS_SHOWN = 8


class BadSample(Exception):
    """A sample that cannot be read as a document. Whoever reads it decides whether that is an error or is counted."""

    def __init__(self, shard: Path, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key!r}: {reason}")
        self.key, self.reason = key, reason


class MappedShard:
    """A shard's bytes, and where its samples lie: `columns` are those of its index."""

    def __init__(self, located: LocatedShard) -> None:
        """Map a shard. Raises CorpusError when it or its index is not what the corpus' index says."""
        self.located = located
        index = _index_of(located)
        # Most text shards have either texts or JSON; of the other there is nothing to remember.
        self.columns = {name: values for name, values in index.columns.items() if (values >= 0).any()}
        self.block_bytes, size = index.block_bytes, located.summary.bytes
        try:
            self._file = MappedFile(self.path, BlockDigests(size, self.block_bytes, index.block_digests))
        except ValueError:
            raise resized_shard(self.path, self.path.stat().st_size, size) from None
        except OSError as error:
            raise unreadable_shard(self.path, error) from error
        self.checked = self._file.checked  # 1 for each block whose digest was compared

    @property
    def path(self) -> Path:
        """Where the shard lies."""
        return self.located.path

    @property
    def memory_bytes(self) -> int:
        """What this takes of the process' own memory; the map is the system's."""
        return sum(column.nbytes for column in self.columns.values()) + self._file.memory_bytes

    def check(self, first: int, last: int) -> None:
        """Compare the digests of the blocks that hold the bytes first … last-1, each of them once.

        Raises CorpusError naming the shard, the block and its bytes.
        """
        try:
            self._file.check(first, last)
        except DamagedBlockError as error:
            raise CorpusError(
                f"{error.block} is not what was indexed: the shard is damaged or was replaced; "
                f"{changed_remedy(self.path.parent)}"
            ) from error

    def bytes_at(self, first: int, size: int) -> bytes:
        """Some bytes of the shard, checked."""
        self.check(first, first + size)
        return self._file.mapped[first : first + size]

    def int64_at(self, first: int, count: int) -> NDArray[np.int64]:
        """Numbers that begin at a byte of the shard, checked: a view of the map."""
        self.check(first, first + 8 * count)
        return np.frombuffer(self._file.mapped, np.int64, count, first)

    def as_array(self, dtype: "np.dtype[np.integer]") -> NDArray[np.integer]:
        """The whole shard as numbers, unchecked: a view of the map, without what is left over at its end."""
        return np.frombuffer(self._file.mapped, dtype, len(self._file.mapped) // dtype.itemsize)

    def text_span(self, document: int) -> tuple[int, int] | None:
        """Where a sample's `.txt` lies, first byte and size; None where it has a `.json`, or neither."""
        if self._span("json", document) is not None:
            return None
        return self._span("txt", document)

    def text(self, document: int, text_field: str) -> str:
        """The text of one sample of a text shard: a field of its `.json`, else its `.txt`.

        Raises BadSample for what cannot be read as a text, and CorpusError for bytes that are not what was indexed.
        """
        json_span, txt_span = self._span("json", document), self._span("txt", document)
        if json_span is not None:
            content = self._json_object(document, json_span, text_field)
            text = content.get(text_field)
            if isinstance(text, str):
                return self._unicode(document, text)
            if txt_span is None:
                problem = "is not a text" if text_field in content else "is missing"
                shown = ", ".join(map(repr, list(content)[:FIELDS_SHOWN])) or "none"
                raise self._bad(document, f"its field {text_field!r} {problem} (fields: {shown})")
        if txt_span is None:
            raise self._bad(document, "it has neither a .txt nor a .json file")
        try:
            return self.bytes_at(*txt_span).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(document, f"not UTF-8 at byte {error.start} of the text") from error

    def _span(self, role: str, document: int) -> tuple[int, int] | None:
        offsets = self.columns.get(f"{role}_offset")
        if offsets is None or offsets[document] < 0:
            return None
        sizes = self.columns.get(f"{role}_bytes")
        return int(offsets[document]), int(sizes[document]) if sizes is not None else 0

    def _json_object(self, document: int, span: tuple[int, int], text_field: str) -> dict[str, object]:
        try:
            content = json.loads(self.bytes_at(*span).decode("utf-8"))
        except (ValueError, RecursionError) as error:  # of the JSON or of its UTF-8
            raise self._bad(document, f"not JSON ({error})") from error
        if not isinstance(content, dict):
            raise self._bad(document, f"its JSON is not an object with a field {text_field!r}")
        return content

    def _unicode(self, document: int, text: str) -> str:
        """JSON can spell half a character (`\\ud800`), which no tokenizer reads."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._bad(document, f"half a character (a lone surrogate) at {error.start} of the text") from error
        return text

    def _bad(self, document: int, reason: str) -> BadSample:
        return BadSample(self.path, self.keys[document], reason)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of all samples. Read again from the index when asked for: keys are for people, and take memory."""
        return _index_of(self.located).keys


def _index_of(located: LocatedShard) -> ShardIndex:
    """A shard's index, which must be the one that the corpus was opened with."""
    if located.index is not None:
        return located.index
    index, _ = own_index(located.path)
    # The name does not count: a shard that was renamed together with its index is the same shard.
    if replace(index.summary, name=located.summary.name) != located.summary:
        raise CorpusError(
            f"{located.path}: its own index and the folder's index.json disagree; {index_remedy(located.path.parent)}"
        )
    return index
