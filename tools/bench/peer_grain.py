"""Grain for the stream benchmark: runs in a virtual environment of its own, without this project.

`python peer_grain.py IDS ENDS OUT` writes documents as ArrayRecord files, one record per document.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE_DOCUMENTS = 10_000
DOCUMENTS_AT_ONCE = 256
WRITER_OPTIONS = "group_size:1,uncompressed"  # random access to single records, as its documentation asks for


def write(ids: NDArray[np.uint16], ends: NDArray[np.int64], out: Path) -> None:
    """One record per document: its ids as bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    out.mkdir(parents=True)
    starts = [0, *ends[:-1].tolist()]
    for first in range(0, len(ends), FILE_DOCUMENTS):
        writer = ArrayRecordWriter(str(out / f"train-{first // FILE_DOCUMENTS:06d}.arrayrecord"), WRITER_OPTIONS)
        span = slice(first, first + FILE_DOCUMENTS)
        for start, end in zip(starts[span], ends[span].tolist(), strict=True):
            writer.write(ids[start:end].tobytes())
        writer.close()


def _as_ids(record: bytes) -> NDArray[np.uint16]:
    return np.frombuffer(record, np.uint16)


def _dataset(folder: Path) -> Any:
    import grain

    source = grain.sources.ArrayRecordDataSource(sorted(map(str, folder.glob("*.arrayrecord"))))
    return grain.MapDataset.source(source).seed(0).shuffle().repeat()


def documents(folder: Path) -> Iterator[NDArray[np.integer]]:
    """All documents in an order that is random over the whole corpus, epoch after epoch."""
    import grain

    # Batches, because their records are read at once; no reading threads, because there is one core.
    dataset = _dataset(folder).map(_as_ids).batch(DOCUMENTS_AT_ONCE, batch_fn=list)
    for together in dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)):
        yield from together


def _as_feature(record: bytes) -> dict[str, NDArray[np.uint16]]:
    return {"ids": np.frombuffer(record, np.uint16)}


def packed_batches(
    folder: Path, rows: int, row_tokens: int
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.integer]]]:
    """Ids and position ids (rows, row_tokens) by Grain's own packing, which splits documents at the ends of rows."""
    import grain

    dataset = _dataset(folder).map(_as_feature).to_iter_dataset(grain.ReadOptions(num_threads=0))
    packed = grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct={"ids": row_tokens})
    for batch in packed.batch(rows, drop_remainder=True):
        yield batch["ids"], batch["ids_positions"]


if __name__ == "__main__":
    write(np.load(sys.argv[1]), np.load(sys.argv[2]), Path(sys.argv[3]))
