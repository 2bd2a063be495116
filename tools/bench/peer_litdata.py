"""LitData for the stream benchmark: runs in a virtual environment of its own, without this project.

`python peer_litdata.py IDS ENDS OUT` writes documents as LitData chunks: OUT/documents for one sample per document,
OUT/tokens for `TokensLoader`, which reads blocks of a fixed number of tokens from documents laid end to end.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 23  # as large as all others'
ENDS_AT_ONCE = 10_000


def documents_between(span: tuple[int, int], ids_path: str, ends_path: str) -> Iterator[NDArray[np.uint16]]:
    """The documents of a span of numbers, as `litdata.optimize` asks for them in its own process."""
    ids, ends = np.load(ids_path, mmap_mode="r"), np.load(ends_path)
    starts = np.concatenate([[0], ends[:-1]])
    for number in range(*span):
        yield np.array(ids[starts[number] : ends[number]])


def write(ids_path: Path, ends_path: Path, out: Path) -> None:
    """The same documents twice: as samples, and as a sequence of tokens."""
    import litdata

    count = len(np.load(ends_path))
    spans = [(first, min(first + ENDS_AT_ONCE, count)) for first in range(0, count, ENDS_AT_ONCE)]
    for name, item_loader in (("documents", None), ("tokens", litdata.TokensLoader())):
        litdata.optimize(
            fn=partial(documents_between, ids_path=str(ids_path), ends_path=str(ends_path)),
            inputs=spans,
            output_dir=str(out / name),
            chunk_bytes=CHUNK_BYTES,
            item_loader=item_loader,
            num_workers=1,
            reorder_files=False,
            verbose=False,
        )


def documents(folder: Path) -> Iterator[NDArray[np.integer]]:
    """All documents, shuffled, epoch after epoch."""
    import litdata

    dataset = litdata.StreamingDataset(str(folder / "documents"), shuffle=True, seed=0)
    while True:
        yield from dataset


def rows(folder: Path, row_tokens: int) -> Iterator[NDArray[np.integer]]:
    """Rows of `row_tokens` tokens of the documents laid end to end, shuffled, epoch after epoch."""
    import litdata

    loader = litdata.TokensLoader(block_size=row_tokens)
    dataset = litdata.StreamingDataset(str(folder / "tokens"), item_loader=loader, shuffle=True, seed=0)
    while True:
        yield from dataset


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
