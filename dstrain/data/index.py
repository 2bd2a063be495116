"""What is in a corpus, written down once: one index per shard (`<shard>.idx.json`) and one per folder (`index.json`).

A shard's index says where each sample lies, so that any document is read without reading the ones before it, and
holds a digest of each block of the shard's bytes, so that they are checked where they are read. A folder's index is
the list of its shards in columns, so that opening a corpus of a million shards reads one file and makes no object
per shard. Both are JSON, hold nothing that varies between two runs of the indexer, and begin with a digest of the
rest of themselves. `index_file.py` says how columns of numbers are written.

    train-000000.tar.idx.json  shard, bytes, digest, kind, documents, tokens, max_id, dtype, block_bytes,
                               block_digests, keys; per sample
                               text    txt_offset, txt_bytes, json_offset, json_bytes (-1 where there is no such file)
                               tokens  block_documents, block_tokens, ids_offset, ends_offset
    index.json                 tokenizer, and per shard names, digests, types, bytes, documents, tokens, max_ids

Digests are XXH3-128: of a shard, what `xxhsum -H128` prints.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from dstrain.base.blocks import DIGEST_BYTES
from dstrain.data.index_file import (
    decode_column,
    encode_column,
    not_an_index,
    read_index_file,
    write_index_file,
)
from dstrain.errors import CorpusError

CORPUS_INDEX_NAME = "index.json"
SHARD_INDEX_SUFFIX = ".idx.json"
DIGEST_BLOCK_BYTES = 1 << 16  # of a shard: what one token of it costs to check

Kind = Literal["text", "tokens"]
IdType = Literal["uint16", "uint32"]
TYPES: tuple[IdType | None, ...] = (None, "uint16", "uint32")  # of a shard's ids, as `index.json` numbers them
TEXT_COLUMNS = ("txt_offset", "txt_bytes", "json_offset", "json_bytes")
TOKEN_COLUMNS = ("block_documents", "block_tokens", "ids_offset", "ends_offset")


@dataclass(frozen=True)
class ShardSummary:
    """What `index.json` says of a shard. `tokens`, `max_id` (the largest id) and `dtype` are None for text shards."""

    name: str
    bytes: int
    digest: str
    kind: Kind
    documents: int
    tokens: int | None
    max_id: int | None
    dtype: IdType | None


@dataclass(frozen=True)
class ShardIndex:
    """A shard's summary, the digests of its blocks, its samples' keys, and the columns of `TEXT_` or `TOKEN_COLUMNS`.

    `block_digests` holds DIGEST_BYTES for each `block_bytes` of the shard, the last block being shorter. Columns are in
    bytes, documents and tokens.
    """

    summary: ShardSummary
    block_bytes: int
    block_digests: bytes
    joined_keys: str
    columns: Mapping[str, NDArray[np.int64]]

    @property
    def keys(self) -> tuple[str, ...]:
        """The samples' keys. They are for people, so they are kept as one string, which takes less memory."""
        return tuple(self.joined_keys.split("\0")) if self.joined_keys else ()


class Names(Sequence[str]):
    """Many names in one string: a million of them take no million objects."""

    def __init__(self, joined: bytes) -> None:
        """Take names as the file system spells them (UTF-8), each ended by a line break."""
        self.joined = joined
        self._ends = np.flatnonzero(np.frombuffer(joined, np.uint8) == ord("\n"))

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Join names. Raises CorpusError for one with a line break."""
        names = list(names)
        joined = "".join(f"{name}\n" for name in names)
        if joined.count("\n") != len(names):
            broken = next(name for name in names if "\n" in name)
            raise CorpusError(f"{broken!r}: a shard's name with a line break; rename the shard")
        return cls(os.fsencode(joined))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[single] for single in range(len(self))[number]]
        number = range(len(self))[number]
        start = int(self._ends[number - 1]) + 1 if number else 0
        return os.fsdecode(self.joined[start : int(self._ends[number])])

    def __iter__(self) -> Iterator[str]:
        return iter(os.fsdecode(self.joined).split("\n")[:-1])


@dataclass(frozen=True)
class ShardTable:
    """The summaries of many shards in columns, all of length N; `table[i]` is one of them as an object."""

    names: Names
    digests: NDArray[np.uint8]  # (N, DIGEST_BYTES)
    types: NDArray[np.int64]  # of ids, an index into TYPES
    bytes: NDArray[np.int64]
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]  # 0 for text
    max_ids: NDArray[np.int64]  # 0 for text

    @classmethod
    def of(cls, summaries: Sequence[ShardSummary]) -> Self:
        """Put summaries into columns."""
        digests = np.frombuffer(bytes.fromhex("".join(summary.digest for summary in summaries)), np.uint8)
        return cls(
            Names.of(summary.name for summary in summaries),
            digests.reshape(-1, DIGEST_BYTES),
            _column(TYPES.index(summary.dtype) for summary in summaries),
            _column(summary.bytes for summary in summaries),
            _column(summary.documents for summary in summaries),
            _column(summary.tokens or 0 for summary in summaries),
            _column(summary.max_id or 0 for summary in summaries),
        )

    @classmethod
    def join(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """All shards of several tables, in order."""
        if len(tables) == 1:
            return tables[0]
        return cls(
            Names(b"".join(table.names.joined for table in tables)),
            np.concatenate([table.digests for table in tables]),
            *(
                np.concatenate([getattr(table, name) for table in tables])
                for name in ("types", "bytes", "documents", "tokens", "max_ids")
            ),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> ShardSummary:
        dtype = TYPES[int(self.types[number])]
        return ShardSummary(
            name=self.names[number],
            bytes=int(self.bytes[number]),
            digest=self.digests[number].tobytes().hex(),
            kind="text" if dtype is None else "tokens",
            documents=int(self.documents[number]),
            tokens=None if dtype is None else int(self.tokens[number]),
            max_id=None if dtype is None else int(self.max_ids[number]),
            dtype=dtype,
        )

    def select(self, numbers: NDArray[np.int64]) -> "ShardTable":
        """Some of the shards, in the order of `numbers`."""
        return ShardTable(
            Names.of(self.names[int(number)] for number in numbers),
            self.digests[numbers],
            self.types[numbers],
            self.bytes[numbers],
            self.documents[numbers],
            self.tokens[numbers],
            self.max_ids[numbers],
        )

    @property
    def digest(self) -> str:
        """The name of these contents in this order: neither their place nor the shards' names count."""
        contents = hashlib.sha256(f"{len(self)} shards\n".encode())
        for column in (self.types, self.bytes, self.digests):
            contents.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).tobytes())
        return contents.hexdigest()


def _column(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


@dataclass(frozen=True)
class CorpusIndex:
    """All shards of a folder in order of their names. `tokenizer` is the digest of what made the ids, where known."""

    shards: ShardTable
    tokenizer: str | None


def shard_index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + SHARD_INDEX_SUFFIX)


def write_shard_index(shard: Path, index: ShardIndex) -> None:
    """Write `<shard>.idx.json` atomically. Raises OSError where the folder cannot be written."""
    summary = index.summary
    content = {
        "shard": summary.name,
        "bytes": summary.bytes,
        "digest": summary.digest,
        "kind": summary.kind,
        "documents": summary.documents,
        "tokens": summary.tokens,
        "max_id": summary.max_id,
        "dtype": summary.dtype,
        "block_bytes": index.block_bytes,
        "block_digests": index.block_digests.hex(),
        "keys": index.joined_keys,
    }
    columns = {name: encode_column(values) for name, values in index.columns.items()}
    write_index_file(shard_index_path(shard), content | columns)


def read_shard_index(shard: Path) -> ShardIndex:
    """Read `<shard>.idx.json`. Raises CorpusError when it is damaged, FileNotFoundError when there is none."""
    path = shard_index_path(shard)
    content = read_index_file(path)
    try:
        summary = ShardSummary(
            name=content["shard"],
            bytes=content["bytes"],
            digest=content["digest"],
            kind=content["kind"],
            documents=content["documents"],
            tokens=content["tokens"],
            max_id=content["max_id"],
            dtype=content["dtype"],
        )
        names = TEXT_COLUMNS if summary.kind == "text" else TOKEN_COLUMNS
        return ShardIndex(
            summary,
            content["block_bytes"],
            bytes.fromhex(content["block_digests"]),
            content["keys"],
            {name: decode_column(content[name]) for name in names},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise not_an_index(path, repr(error)) from error


def write_corpus_index(folder: Path, index: CorpusIndex) -> None:
    """Write `index.json` atomically. Raises OSError where the folder cannot be written."""
    shards = index.shards
    write_index_file(
        folder / CORPUS_INDEX_NAME,
        {
            "tokenizer": index.tokenizer,
            "names": os.fsdecode(shards.names.joined),
            "digests": shards.digests.tobytes().hex(),
            "types": encode_column(shards.types),
            "bytes": encode_column(shards.bytes),
            "documents": encode_column(shards.documents),
            "tokens": encode_column(shards.tokens),
            "max_ids": encode_column(shards.max_ids),
        },
    )


def read_corpus_index(folder: Path) -> CorpusIndex | None:
    """Read a folder's `index.json`, None when there is none. Raises CorpusError when it is damaged."""
    path = folder / CORPUS_INDEX_NAME
    try:
        content = read_index_file(path)
    except FileNotFoundError:
        return None
    try:
        digests = np.frombuffer(bytes.fromhex(content.pop("digests")), np.uint8).reshape(-1, DIGEST_BYTES)
        columns = (decode_column(content.pop(name)) for name in ("types", "bytes", "documents", "tokens", "max_ids"))
        table = ShardTable(Names(os.fsencode(content.pop("names"))), digests, *columns)
        return CorpusIndex(table, content["tokenizer"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise not_an_index(path, repr(error)) from error
