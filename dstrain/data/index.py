"""What is in a corpus, written down once: one index per shard (`<shard>.idx.json`) and one per folder (`index.json`).

A shard's index says where each sample lies, so that any document is read without reading the ones before it. A
folder's index is the list of its shards with their sizes and digests, so that opening a corpus of 100,000 shards
reads one file. Both are plain JSON with parallel arrays, and hold nothing that varies between two runs of the
indexer.

    train-000000.tar.idx.json  version, shard, bytes, digest, kind, documents, tokens, max_id, dtype, keys; per sample
                               text    txt_offset, txt_bytes, json_offset, json_bytes (-1 where there is no such file)
                               tokens  block_documents, block_tokens, ids_offset, ends_offset
    index.json                 version, kind, documents, tokens, tokenizer, digest, and the summary of every shard
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dstrain.errors import CorpusError

INDEX_VERSION = 1
CORPUS_INDEX_NAME = "index.json"
SHARD_INDEX_SUFFIX = ".idx.json"
REINDEX = "run `dstrain shards index` on its folder"

Kind = Literal["text", "tokens"]
TEXT_COLUMNS = ("txt_offset", "txt_bytes", "json_offset", "json_bytes")
TOKEN_COLUMNS = ("block_documents", "block_tokens", "ids_offset", "ends_offset")


@dataclass(frozen=True)
class ShardSummary:
    """One line of `index.json`. `tokens`, `max_id` (the largest token id) and `dtype` are null for text shards."""

    name: str
    bytes: int
    digest: str
    kind: Kind
    documents: int
    tokens: int | None
    max_id: int | None
    dtype: Literal["uint16", "uint32"] | None


@dataclass(frozen=True)
class ShardIndex:
    """A shard's summary, its samples' keys, and the columns named by `TEXT_COLUMNS` or `TOKEN_COLUMNS` (in bytes)."""

    summary: ShardSummary
    keys: tuple[str, ...]
    columns: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class CorpusIndex:
    """All shards of a folder in order of their names. `tokenizer` is the digest of what made the ids, where known."""

    shards: tuple[ShardSummary, ...]
    tokenizer: str | None

    @property
    def digest(self) -> str:
        """A corpus is its shards' contents in order: neither its place nor its shards' names count."""
        return corpus_digest(self.shards)


def corpus_digest(shards: Sequence[ShardSummary]) -> str:
    """The name of these contents in this order."""
    contents = hashlib.sha256()
    for shard in shards:
        contents.update(f"{shard.kind} {shard.bytes} {shard.digest}\n".encode())
    return contents.hexdigest()


def total_tokens(shards: Sequence[ShardSummary]) -> int | None:
    """All tokens of these shards, specials included; None for text, whose tokens nobody has counted."""
    counts = [shard.tokens for shard in shards if shard.tokens is not None]
    return sum(counts) if len(counts) == len(shards) else None


def shard_index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + SHARD_INDEX_SUFFIX)


def write_shard_index(shard: Path, index: ShardIndex) -> None:
    """Write `<shard>.idx.json` atomically. Raises OSError where the folder cannot be written."""
    summary = asdict(index.summary)
    summary["shard"] = summary.pop("name")
    columns = {name: values.tolist() for name, values in index.columns.items()}
    write_json(shard_index_path(shard), {"version": INDEX_VERSION, **summary, "keys": index.keys, **columns})


def read_shard_index(shard: Path) -> ShardIndex:
    """Read `<shard>.idx.json`. Raises CorpusError when it is damaged, FileNotFoundError when there is none."""
    path = shard_index_path(shard)
    content = read_json(path)
    try:
        summary = _summary({**content, "name": content["shard"]})
        names = TEXT_COLUMNS if summary.kind == "text" else TOKEN_COLUMNS
        columns = {name: np.array(content[name], np.int64) for name in names}
        keys = tuple(content["keys"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(f"{path}: not an index of dstrain ({error!r}); {REINDEX}") from error
    if any(len(values) != len(keys) for values in columns.values()):
        raise CorpusError(f"{path}: its arrays differ in length; {REINDEX}")
    return ShardIndex(summary, keys, columns)


def write_corpus_index(folder: Path, index: CorpusIndex) -> None:
    """Write `index.json` atomically. Raises OSError where the folder cannot be written."""
    write_json(
        folder / CORPUS_INDEX_NAME,
        {
            "version": INDEX_VERSION,
            "kind": index.shards[0].kind if index.shards else None,
            "documents": sum(shard.documents for shard in index.shards),
            "tokens": total_tokens(index.shards),
            "tokenizer": index.tokenizer,
            "digest": index.digest,
            "shards": [asdict(shard) for shard in index.shards],
        },
    )


def read_corpus_index(folder: Path) -> CorpusIndex | None:
    """Read a folder's `index.json`, None when there is none. Raises CorpusError when it is damaged."""
    path = folder / CORPUS_INDEX_NAME
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    try:
        index = CorpusIndex(tuple(_summary(shard) for shard in content["shards"]), content["tokenizer"])
        recorded = content["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(f"{path}: not an index of dstrain ({error!r}); {REINDEX}") from error
    if recorded != index.digest:
        raise CorpusError(f"{path}: its digest does not fit its own list of shards; {REINDEX}")
    return index


def _summary(content: Mapping[str, Any]) -> ShardSummary:
    if content["kind"] not in ("text", "tokens"):
        raise ValueError(f"kind {content['kind']!r}")
    return ShardSummary(
        name=str(content["name"]),
        bytes=int(content["bytes"]),
        digest=str(content["digest"]),
        kind=content["kind"],
        documents=int(content["documents"]),
        tokens=content["tokens"],
        max_id=content["max_id"],
        dtype=content["dtype"],
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object written by this module. Raises CorpusError when it is damaged or of another version."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorpusError(f"{path}: damaged index ({error}); {REINDEX}") from error
    if not isinstance(content, dict) or content.get("version") != INDEX_VERSION:
        raise CorpusError(f"{path}: not an index of version {INDEX_VERSION}; {REINDEX}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` at once: a reader sees the old file or the new one, also when several processes write the same."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        staging.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
