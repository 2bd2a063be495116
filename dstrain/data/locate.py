"""From what a recipe says (a folder, a glob, a brace pattern) to the index entries of exactly those shards.

Nothing that the location names may be missing, and nothing that lies beside it may be left out: a run never trains
on silently fewer data. That takes one look at a folder's names; a shard's size and bytes are checked where it is
opened and read, for a look at a million files takes minutes. (`Located.check_sizes` has a look at those of a smaller
corpus, before a run begins.) Shards without an index get one here, by a single scan, kept beside them. Where the
folder cannot be written, the same files lie in the user's cache folder (`user_cache.py`), by a hash of path, size and
times of the shard, or of all shards that were asked for:

    indexes/<hash>.idx.json     of a shard
    indexes/<hash>/index.json   of a folder
"""

import fnmatch
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from numpy.typing import NDArray

from dstrain.data.index import (
    CORPUS_INDEX_NAME,
    SHARD_INDEX_SUFFIX,
    TYPES,
    CorpusIndex,
    ShardIndex,
    ShardSummary,
    ShardTable,
    read_corpus_index,
    read_shard_index,
    shard_index_path,
    write_corpus_index,
    write_shard_index,
)
from dstrain.data.index_file import index_remedy
from dstrain.data.scan import scan_shard
from dstrain.data.user_cache import file_stamp, is_writable, keep, user_cache, warn_once
from dstrain.errors import CorpusError

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")
FORMS = "a folder of .tar shards, a glob (train-*.tar) or a brace pattern (train-{000000..000099}.tar)"
UNFINISHED_NAME = ".unfinished"
CACHE_NAME = "indexes"
SIZES_COMPARED = 20_000  # shards that are looked at one by one: some seconds on a network's file system


@dataclass(frozen=True)
class LocatedShard:
    """A shard's path and what its index says of it. `index` is set only where it could not be written anywhere."""

    path: Path
    summary: ShardSummary
    index: ShardIndex | None


@dataclass(frozen=True)
class Located:
    """All shards of a location in order. `tokenizer` is the digest of what made their ids, where known.

    `indexes` holds, by number of shard, the indexes that could not be written anywhere.
    """

    table: ShardTable
    folders: tuple[Path, ...]
    folder_numbers: NDArray[np.int64]  # of each shard
    indexes: Mapping[int, ShardIndex]
    tokenizer: str | None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> LocatedShard:
        return LocatedShard(self.path(number), self.table[number], self.indexes.get(number))

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folders[int(self.folder_numbers[number])] / self.table.names[number]

    def check_sizes(self) -> None:
        """Compare the sizes of all shards with what their indexes say; of more than SIZES_COMPARED, of none.

        Raises CorpusError naming the first shard of another size, or that cannot be looked at.
        """
        if len(self) > SIZES_COMPARED:
            return
        for number, expected in enumerate(self.table.bytes.tolist()):
            path = self.path(number)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise unreadable_shard(path, error) from error
            if size != expected:
                raise resized_shard(path, size, expected)


def locate(location: str) -> Located:
    """The shards of a location, indexed. Raises CorpusError naming the shard, what is wrong with it, and the remedy."""
    return _locate(location, select(location))


def locate_indexed(location: str) -> Located | None:
    """The same, but None where a folder has no `index.json` yet, neither of its own nor in the cache.

    Reads no shard. Raises CorpusError.
    """
    selections = select(location)
    return _locate(location, selections) if all(folder.is_indexed(names) for folder, names in selections) else None


def _locate(location: str, selections: Sequence[tuple["FolderListing", Sequence[str]]]) -> Located:
    located = _join(location, [listing.located(names) for listing, names in selections])
    table = located.table
    kinds = sorted({TYPES[number] or "text" for number in np.unique(table.types)})
    if "text" in kinds and len(kinds) > 1:
        raise CorpusError(f"{location}: its shards differ in text and token shards; train on one kind at a time")
    if len(kinds) > 1:
        raise CorpusError(
            f"{location}: its shards differ in types of ids ({', '.join(kinds)}); train on one kind at a time"
        )
    if not table.documents.sum():
        raise CorpusError(f"{location}: holds no documents; give {FORMS}")
    return located


def locate_shard(shard: Path) -> LocatedShard:
    """One shard by its path, without a look at what else is in its folder. Raises CorpusError."""
    if (shard.parent / UNFINISHED_NAME).exists():
        raise unfinished_build(shard.parent)
    return _from_own_index(shard)


def select(location: str) -> list[tuple["FolderListing", Sequence[str]]]:
    """The folders of a location, and which shards of each it asks for: also ones that are not there."""
    folder = Path(location)
    if folder.is_dir():
        listing = FolderListing(folder)
        return [(listing, listing.matching("*.tar"))]
    selections: list[tuple[FolderListing, Sequence[str]]] = []
    for parent, names in _by_parent(location):
        if not parent.is_dir():
            raise CorpusError(f"{location}: there is no folder {parent}; give {FORMS}")
        listing = FolderListing(parent)
        if len(names) == 1 and _is_glob(names[0]):
            selections.append((listing, listing.matching(names[0])))
            continue
        expanded: list[str] = []
        for name in names:
            expanded += listing.matching(name) if _is_glob(name) else [name]
        if len(set(expanded)) < len(expanded):
            raise CorpusError(f"{location}: names a shard twice; give {FORMS}")
        selections.append((listing, expanded))
    return selections


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _by_parent(location: str) -> Iterator[tuple[Path, list[str]]]:
    """The files that a brace pattern spells out, by folder, in the order of their mention; globs stay as they are."""
    try:
        paths = [Path(path) for path in braceexpand(location)]
    except UnbalancedBracesError as error:
        raise CorpusError(f"{location}: unbalanced braces; give {FORMS}") from error
    by_parent: dict[Path, list[str]] = {}
    for path in paths:
        if _is_glob(str(path.parent)):
            raise CorpusError(f"{location}: a glob in a folder's name; use braces there, or one of {FORMS}")
        by_parent.setdefault(path.parent, []).append(path.name)
    yield from by_parent.items()


def _join(location: str, parts: Sequence[Located]) -> Located:
    if len(parts) == 1:
        return parts[0]
    tokenizers = {part.tokenizer for part in parts}
    if len(tokenizers) > 1:
        named = ", ".join(f"{part.folders[0]}: {(part.tokenizer or 'unknown')[:12]}" for part in parts)
        raise CorpusError(f"{location}: its shards differ in tokenizers ({named}); train on one kind at a time")
    firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    return Located(
        ShardTable.join([part.table for part in parts]),
        tuple(part.folders[0] for part in parts),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        {
            first + number: index
            for first, part in zip(firsts, parts, strict=False)
            for number, index in part.indexes.items()
        },
        parts[0].tokenizer,
    )


class FolderListing:
    """One folder as one `scandir` found it: the names that lie there, and what its `index.json` lists."""

    def __init__(self, folder: Path, *, read_index: bool = True) -> None:
        """Look into a folder. Raises CorpusError for an unfinished build and a damaged `index.json`."""
        self.folder = folder
        self.index = read_corpus_index(folder) if read_index else None
        self._compressed, shards = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.endswith(".tar"):
                    if not entry.is_dir(follow_symlinks=False):
                        shards.append(name)
                elif name.endswith(".json"):  # an index, as half of a million names are
                    pass
                elif name.endswith(COMPRESSED_SUFFIXES):
                    self._compressed.append(name)
                elif name == UNFINISHED_NAME:
                    raise unfinished_build(folder)
        shards.sort()
        self._shards: list[str] | None = shards
        if self.index is not None and self.index.shards.names.joined == os.fsencode("\n".join([*shards, ""])):
            self._shards = None  # the index has them all; a million names are worth some memory

    @property
    def shards(self) -> Sequence[str]:
        """The .tar files that are there, sorted."""
        if self._shards is not None:
            return self._shards
        assert self.index is not None
        return self.index.shards.names

    @cached_property
    def _present(self) -> frozenset[str]:
        return frozenset(self.shards)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Name → its number in `index.json`; empty where there is none."""
        return {name: number for number, name in enumerate(self.index.shards.names)} if self.index else {}

    def has(self, name: str) -> bool:
        """Whether a shard is there."""
        return name in self._present

    def matching(self, pattern: str) -> Sequence[str]:
        """The shards that a glob asks for: those that are there, and those that `index.json` says should be.

        Raises CorpusError when there are none, or when some are compressed.
        """
        compressed = sorted(self._compressed if pattern == "*.tar" else fnmatch.filter(self._compressed, pattern))
        if compressed:
            raise CorpusError(
                f"{self.folder / compressed[0]}: compressed, so no document can be read by its place; decompress the "
                f"shards (found {len(compressed)} such), or use another folder"
            )
        if self._shards is None and pattern == "*.tar":
            return self.shards
        listed = self.index.shards.names if self.index else ()
        names = sorted({*fnmatch.filter(self.shards, pattern), *fnmatch.filter(listed, pattern)})
        names = [name for name in names if name.endswith(".tar")]
        if not names:
            raise CorpusError(f"{self.folder / pattern}: no .tar shards there; give {FORMS}")
        return names

    def located(self, names: Sequence[str]) -> Located:
        """These shards, indexed, none of them missing or unlisted."""
        if self._shards is None and names is self.shards:
            assert self.index is not None
            return self._whole(self.index.shards, {}, self.index.tokenizer)
        missing = [name for name in names if not self.has(name)]
        if missing:
            source = CORPUS_INDEX_NAME if missing[0] in self.numbers else "the location"
            raise CorpusError(
                f"{self.folder / missing[0]}: the shard is missing ({len(missing)} in all), though {source} names it; "
                f"bring it back, or {index_remedy(self.folder)} to leave it out"
            )
        if self.index is None:
            return self._located_without_index(names)
        unlisted = [name for name in names if name not in self.numbers]
        if unlisted:
            raise CorpusError(
                f"{self.folder / unlisted[0]}: not in {CORPUS_INDEX_NAME} ({len(unlisted)} such shards); "
                f"{index_remedy(self.folder)} to take it in"
            )
        numbers = np.array([self.numbers[name] for name in names], np.int64)
        return self._whole(self.index.shards.select(numbers), {}, self.index.tokenizer)

    def is_indexed(self, names: Sequence[str]) -> bool:
        """Whether it is known what is in these shards."""
        if self.index is not None:
            return True
        cached = self._cached_index(names)
        return cached is not None and (cached / CORPUS_INDEX_NAME).is_file()

    def _cached_index(self, names: Sequence[str]) -> Path | None:
        """Where in the cache the index of these shards lies, as if in their folder, if that cannot be written."""
        if is_writable(self.folder) or not all(map(self.has, names)):
            return None
        return _cached(self.folder / name for name in names)

    def _located_without_index(self, names: Sequence[str]) -> Located:
        cached = self._cached_index(names)
        if cached is not None:
            with suppress(OSError, CorpusError):  # then it is made anew
                known = read_corpus_index(cached)
                if known is not None:
                    return self._whole(known.shards, {}, None)
        shards = [_from_own_index(self.folder / name) for name in names]
        table = ShardTable.of([shard.summary for shard in shards])
        keep(
            lambda path: write_corpus_index(path.parent, CorpusIndex(table, None)),
            self.folder / CORPUS_INDEX_NAME if set(names) == self._present else None,
            cached and cached / CORPUS_INDEX_NAME,
        )
        kept = {number: shard.index for number, shard in enumerate(shards) if shard.index is not None}
        return self._whole(table, kept, None)

    def _whole(self, table: ShardTable, indexes: Mapping[int, ShardIndex], tokenizer: str | None) -> Located:
        return Located(table, (self.folder,), np.zeros(len(table), np.int64), indexes, tokenizer)


def unfinished_build(folder: Path) -> CorpusError:
    """The error of a folder that `shards build` has marked."""
    return CorpusError(
        f"{folder}: an unfinished build: `dstrain shards build` was stopped before it ended, or is still at work; "
        f"wait for it, or remove what it wrote with `rm -r {shlex.quote(str(folder))}` and build again"
    )


def resized_shard(shard: Path, size: int, expected: int) -> CorpusError:
    """The error of a shard that has not as many bytes as its index says."""
    return CorpusError(
        f"{shard}: {size} bytes, but its index expects {expected}: the shard is truncated or was changed after "
        f"indexing; {changed_remedy(shard.parent)}"
    )


def unreadable_shard(shard: Path, error: OSError) -> CorpusError:
    """The error of a shard that the file system does not give."""
    return CorpusError(f"{shard}: cannot be read ({error}); {changed_remedy(shard.parent)}")


def changed_remedy(folder: Path) -> str:
    """What to do about a shard that is not what was indexed."""
    return (
        f"find such shards with `dstrain shards check {shlex.quote(str(folder))}` and copy them again, or, if the "
        f"change is meant, {index_remedy(folder)}"
    )


# ---------------------------------------------------------------- a shard's own index


def _from_own_index(shard: Path) -> LocatedShard:
    """A shard by its own index, which is made if need be."""
    index, is_kept = own_index(shard)
    summary = replace(index.summary, name=shard.name)  # both may have been renamed
    return LocatedShard(shard, summary, None if is_kept else index)


def own_index(shard: Path) -> tuple[ShardIndex, bool]:
    """The index beside a shard, or in the cache, or else from a scan; and whether it is kept. Raises CorpusError."""
    try:
        return read_shard_index(shard), True
    except FileNotFoundError:
        pass
    cached = _cached([shard])
    if cached is not None:
        with suppress(OSError, CorpusError):  # then it is made anew
            return read_shard_index(cached), True
    index = scan_shard(shard)
    is_kept = keep(
        lambda path: write_shard_index(path.with_name(path.name.removesuffix(SHARD_INDEX_SUFFIX)), index),
        shard_index_path(shard),
        cached and shard_index_path(cached),
    )
    if not is_kept:
        warn_once(
            f"{shard.parent}: neither it nor {user_cache(CACHE_NAME) or 'a cache folder (there is no home)'} can be "
            f"written, so at every start each rank and each data process reads its shards from end to end; "
            f"{index_remedy(shard.parent)} on a copy that can be written, or set XDG_CACHE_HOME to a folder that can"
        )
    return index, is_kept


def _cached(shards: Iterable[Path]) -> Path | None:
    """Where in the cache the index lies of a shard, as if it were beside it, or of all shards, as if in their folder.

    Raises CorpusError for a shard that cannot be looked at.
    """
    stamps = xxhash.xxh3_128()
    for shard in shards:
        try:
            stamps.update(os.fsencode(file_stamp(shard)) + b"\n")
        except OSError as error:
            raise unreadable_shard(shard, error) from error
    return user_cache(CACHE_NAME, stamps.hexdigest())
