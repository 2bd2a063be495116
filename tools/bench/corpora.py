"""What the benchmarks read: random documents with realistic lengths, and corpora of many shards that take no room."""

import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packing import CLS_ID, FIRST_ORDINARY_ID, SEP_ID, VOCAB_SIZE

from dstrain.data.index import CorpusIndex, Names, ShardTable, shard_index_path, write_corpus_index
from dstrain.data.writer import write_token_shards

SHARD_BYTES = 1 << 23  # of all formats of the stream benchmark
MOST_LINKS = 60_000  # of a file: ext4 allows 65,000


def documents(count: int, seed: int = 0) -> Iterator[NDArray[np.uint16]]:
    """Random documents of log-normal lengths (median 180 tokens, mean about 300), [CLS] and [SEP] in place."""
    rng = np.random.default_rng(seed)
    for length in np.clip(rng.lognormal(np.log(180), 1.0, count), 4, 8000).astype(int).tolist():
        document = rng.integers(FIRST_ORDINARY_ID, VOCAB_SIZE, length, dtype=np.uint16)
        document[0], document[-1] = CLS_ID, SEP_ID
        yield document


def write_tokens(folder: Path, content: Iterable[NDArray[np.uint16]], shard_bytes: int = SHARD_BYTES) -> CorpusIndex:
    """Token shards of this project."""
    return write_token_shards(folder, content, vocab_size=VOCAB_SIZE, tokenizer=None, shard_bytes=shard_bytes)


def write_linked_corpus(folder: Path, originals: Path, shards: int, shard_documents: int) -> int:
    """A corpus of `shards` names of a few shards, which lie in `originals`. Returns the number of its tokens.

    Every name is a hard link, and so is the index beside it: opening this corpus costs what one of as many different
    shards would, while its bytes fit the page cache.
    """
    count = max(1, -(-shards // MOST_LINKS))
    tables = []
    for number in range(count):
        index = write_tokens(originals / str(number), documents(shard_documents, seed=number), shard_bytes=1 << 40)
        tables.append(index.shards)
    table = ShardTable.join(tables)
    numbers = np.arange(shards) % count
    names = [f"train-{number:07d}.tar" for number in range(shards)]
    folder.mkdir()
    for name, number in zip(names, numbers.tolist(), strict=True):
        original = originals / str(number) / tables[number].names[0]
        os.link(original, folder / name)
        os.link(shard_index_path(original), shard_index_path(folder / name))
    linked = ShardTable(
        Names.of(names),
        table.digests[numbers],
        table.types[numbers],
        table.bytes[numbers],
        table.documents[numbers],
        table.tokens[numbers],
        table.max_ids[numbers],
    )
    write_corpus_index(folder, CorpusIndex(linked, None))
    return int(linked.tokens.sum())


def median_of(rounds: Iterable[dict[str, float]], key: str) -> float:
    """The median of one measurement over the rounds."""
    return statistics.median(result[key] for result in rounds)


def table(lines: list[dict[str, Any]]) -> str:
    """Aligned columns under the keys of the lines."""
    rows = [list(lines[0]), *[[str(value) for value in line.values()] for line in lines]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
