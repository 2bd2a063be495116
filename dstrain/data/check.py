"""Reads a whole corpus again and says everything that is wrong with it, not only the first thing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dstrain.data.index import ShardIndex, read_shard_index, shard_index_path
from dstrain.data.index_file import index_remedy
from dstrain.data.locate import FolderListing, LocatedShard, locate, select
from dstrain.data.mapped import BadSample, MappedShard
from dstrain.data.scan import scan_shard
from dstrain.errors import CorpusError


@dataclass(frozen=True)
class CheckReport:
    """What is in a corpus. `problems` is empty when it can be trained on; each names its shard and the remedy."""

    shards: int
    documents: int
    tokens: int | None
    problems: tuple[str, ...]


def check_corpus(location: str, text_field: str) -> CheckReport:
    """Compare every shard with its indexes, byte for byte, and read every sample.

    Raises CorpusError only where the location itself cannot be understood, or a folder's `index.json` cannot be read.
    """
    problems: list[str] = []
    found: list[ShardIndex] = []
    shards = 0
    for listing, names in select(location):
        for name in names:
            shards += 1
            try:
                index = _scan(listing, name)
            except CorpusError as error:
                problems.append(str(error))
                continue
            found.append(index)
            problems.extend(_differences(listing, index))
            problems.extend(_unreadable_samples(listing, index, text_field))
    if not problems:
        try:
            locate(location)  # what only shows between shards
        except CorpusError as error:
            problems.append(str(error))
    tokens = [index.summary.tokens for index in found if index.summary.tokens is not None]
    documents = sum(index.summary.documents for index in found)
    return CheckReport(shards, documents, sum(tokens) if len(tokens) == shards else None, tuple(problems))


def _scan(listing: FolderListing, name: str) -> ShardIndex:
    if not listing.has(name):
        raise CorpusError(
            f"{listing.folder / name}: the shard is missing; bring it back, or {index_remedy(listing.folder)} to leave "
            "it out"
        )
    return scan_shard(listing.folder / name)


def _differences(listing: FolderListing, index: ShardIndex) -> Iterator[str]:
    """Where the indexes on disk say something else than the shard."""
    path, remedy = listing.folder / index.summary.name, index_remedy(listing.folder)
    if listing.index is not None:
        number = listing.numbers.get(path.name)
        if number is None:
            yield f"{path}: not in index.json; {remedy} to take it in"
        elif listing.index.shards[number].digest != index.summary.digest:
            yield f"{path}: its content is not what index.json says; copy it again, or {remedy} if the change is meant"
    try:
        written = read_shard_index(path)
    except FileNotFoundError:
        return
    except CorpusError as error:
        yield str(error)
        return
    same_columns = written.columns.keys() == index.columns.keys() and all(
        np.array_equal(values, written.columns[name]) for name, values in index.columns.items()
    )
    same_bytes = (written.summary, written.block_digests) == (index.summary, index.block_digests)
    if not (same_bytes and same_columns and written.joined_keys == index.joined_keys):
        yield f"{shard_index_path(path)}: is not the index of this shard; {remedy}"


def _unreadable_samples(listing: FolderListing, index: ShardIndex, text_field: str) -> Iterator[str]:
    if index.summary.kind == "tokens":
        return  # the scan has read all of them
    shard = MappedShard(LocatedShard(listing.folder / index.summary.name, index.summary, index))
    for document in range(index.summary.documents):
        try:
            shard.text(document, text_field)
        except BadSample as bad:
            yield f"{bad}; repair or remove the sample, or train with data.on_bad_sample: skip"
