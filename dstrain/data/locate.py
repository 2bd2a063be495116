"""From what a recipe says (a folder, a glob, a brace pattern) to an index of exactly those shards.

Nothing that the location names may be missing, and nothing may differ in size from what was indexed: a run never
trains on silently fewer data. Shards without an index get one here, by a single scan, kept beside them where the
folder can be written.
"""

import contextlib
import fnmatch
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from dstrain.data.index import (
    CORPUS_INDEX_NAME,
    REINDEX,
    CorpusIndex,
    ShardIndex,
    ShardSummary,
    read_corpus_index,
    read_shard_index,
    shard_index_path,
    write_corpus_index,
    write_shard_index,
)
from dstrain.data.scan import scan_shard
from dstrain.errors import CorpusError

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")
FORMS = "a folder of .tar shards, a glob (train-*.tar) or a brace pattern (train-{000000..000099}.tar)"


@dataclass(frozen=True)
class LocatedShard:
    """A shard's path and what its index says of it. `index` is set only where it could not be written beside it."""

    path: Path
    summary: ShardSummary
    index: ShardIndex | None


@dataclass(frozen=True)
class Located:
    """All shards of a location in order. `tokenizer` is the digest of what made their ids, where known."""

    shards: tuple[LocatedShard, ...]
    tokenizer: str | None


def locate(location: str) -> Located:
    """The shards of a location, indexed. Raises CorpusError naming the shard, expected and found, and the remedy."""
    return _join(location, [listing.located(names) for listing, names in select(location)])


def select(location: str) -> list[tuple["FolderListing", list[str]]]:
    """The folders of a location, and which shards of each it asks for: also ones that are not there."""
    folder = Path(location)
    if folder.is_dir():
        listing = FolderListing(folder)
        return [(listing, listing.matching("*.tar"))]
    selections = []
    for parent, names in _by_parent(location):
        if not parent.is_dir():
            raise CorpusError(f"{location}: there is no folder {parent}; give {FORMS}")
        listing = FolderListing(parent)
        selections.append((listing, listing.matching(names[0]) if _is_glob(names[0]) else names))
    return selections


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _by_parent(location: str) -> Iterator[tuple[Path, list[str]]]:
    """The files that a brace pattern spells out, by folder, in the order of their mention; a glob stays one name."""
    try:
        paths = [Path(path) for path in braceexpand(location)]
    except UnbalancedBracesError as error:
        raise CorpusError(f"{location}: unbalanced braces; give {FORMS}") from error
    by_parent: dict[Path, list[str]] = {}
    for path in paths:
        if _is_glob(str(path.parent)):
            raise CorpusError(f"{location}: a glob in a folder's name; use braces there, or one of {FORMS}")
        by_parent.setdefault(path.parent, []).append(path.name)
    for parent, names in by_parent.items():
        if any(map(_is_glob, names)):
            yield from ((parent, [name]) for name in names)
        else:
            yield parent, names


def _join(location: str, selections: Iterable[Located]) -> Located:
    selections = list(selections)
    shards = tuple(shard for selection in selections for shard in selection.shards)
    for what, values in (
        ("text and token shards", {shard.summary.kind for shard in shards}),
        ("types of ids", {shard.summary.dtype for shard in shards}),
        ("tokenizers", {selection.tokenizer for selection in selections}),
    ):
        if len(values) > 1:
            raise CorpusError(f"{location}: its shards differ in {what}: {values}; train on one kind at a time")
    if len({shard.path for shard in shards}) < len(shards):
        raise CorpusError(f"{location}: names a shard twice; give {FORMS}")
    if not sum(shard.summary.documents for shard in shards):
        raise CorpusError(f"{location}: holds no documents; give {FORMS}")
    return Located(shards, selections[0].tokenizer)


class FolderListing:
    """One folder as one `scandir` found it: what lies there, and what its `index.json` lists."""

    def __init__(self, folder: Path, *, read_index: bool = True) -> None:
        self.folder = folder
        with os.scandir(folder) as entries:
            self.sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        index = read_corpus_index(folder) if read_index else None
        self.listed = {shard.name: shard for shard in index.shards} if index else None
        self._tokenizer = index.tokenizer if index else None

    def present(self, pattern: str) -> list[str]:
        """The tar files that a glob matches, sorted. Raises CorpusError when some are compressed."""
        names = fnmatch.filter(self.sizes, pattern)
        if pattern == "*.tar":
            names += [name for name in self.sizes if name.endswith(COMPRESSED_SUFFIXES)]
        compressed = sorted(name for name in names if name.endswith(COMPRESSED_SUFFIXES))
        if compressed:
            raise CorpusError(
                f"{self.folder / compressed[0]}: compressed, so no document can be read by its place; decompress the "
                f"shards (found {len(compressed)} such), or use another folder"
            )
        return sorted(name for name in names if name.endswith(".tar"))

    def matching(self, pattern: str) -> list[str]:
        """The shards that a glob asks for: those that are there, and those that `index.json` says should be."""
        names = sorted({*self.present(pattern), *fnmatch.filter(self.listed or (), pattern)})
        if not names:
            raise CorpusError(f"{self.folder / pattern}: no .tar shards there; give {FORMS}")
        return names

    def located(self, names: list[str]) -> Located:
        """These shards, indexed and checked against what is there."""
        missing = [name for name in names if name not in self.sizes]
        if missing:
            source = CORPUS_INDEX_NAME if self.listed and missing[0] in self.listed else "the location"
            raise CorpusError(
                f"{self.folder / missing[0]}: the shard is missing ({len(missing)} in all), though {source} names it; "
                f"bring it back, or {REINDEX} to leave it out"
            )
        if self.listed is None:
            return self._located_without_index(names)
        unlisted = [name for name in names if name not in self.listed]
        if unlisted:
            raise CorpusError(
                f"{self.folder / unlisted[0]}: not in {CORPUS_INDEX_NAME} ({len(unlisted)} such shards); {REINDEX} to "
                "take it in"
            )
        shards = tuple(LocatedShard(self.folder / name, self._checked(self.listed[name]), None) for name in names)
        return Located(shards, self._tokenizer)

    def _located_without_index(self, names: list[str]) -> Located:
        shards = tuple(self._from_own_index(name) for name in names)
        if set(names) == {name for name in self.sizes if name.endswith(".tar")}:
            with contextlib.suppress(OSError):  # a read-only folder: the index is made again next time
                write_corpus_index(self.folder, CorpusIndex(tuple(shard.summary for shard in shards), None))
        return Located(shards, None)

    def _checked(self, summary: ShardSummary) -> ShardSummary:
        found = self.sizes[summary.name]
        if found != summary.bytes:
            raise CorpusError(
                f"{self.folder / summary.name}: {found} bytes, but its index expects {summary.bytes}: the shard "
                "is truncated or was "
                f"changed after indexing; copy it again, or {REINDEX} if the change is meant"
            )
        return summary

    def _from_own_index(self, name: str) -> LocatedShard:
        shard = self.folder / name
        if shard_index_path(shard).name in self.sizes:
            return LocatedShard(shard, self._checked(read_shard_index(shard).summary), None)
        index, written = scan_and_keep(shard)
        return LocatedShard(shard, index.summary, None if written else index)


def scan_and_keep(shard: Path) -> tuple[ShardIndex, bool]:
    """Scan a shard and keep its index beside it; the second value says whether that could be written."""
    index = scan_shard(shard)
    try:
        write_shard_index(shard, index)
    except OSError:  # a read-only folder
        return index, False
    return index, True
