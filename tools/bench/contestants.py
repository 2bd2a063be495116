"""One contestant of the stream benchmark in one process: `python contestants.py NAME '{…}'` prints its speed as JSON.

Each one is written the way its own documentation does it, in its fastest form, and shuffles through 1,024 documents:

    dstrain               token shards, rows made in this process, with digests
    dstrain-background    the same rows from the background process, this process only receives them
    webdataset            the same token shards: blocks of documents, decoded by webdataset, taken apart, shuffled
    webdataset-documents  one sample per document, as WebDataset users store text
    datasets              Parquet, streaming, shuffled
    datasets-arrow        Parquet, streaming, whole Arrow batches and no shuffle: the upper bound of `datasets`
    mosaicml-streaming    MDS shards, shuffled (py1e); runs under its own virtual environment
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packing import MASK_ID, REPLACE, VOCAB_SIZE, BatchShape, batches

Documents = Iterator[NDArray[np.integer]]
SHUFFLE_DOCUMENTS = 1024
ARROW_BATCH_DOCUMENTS = 1000


def webdataset_blocks(folder: Path) -> Documents:
    import webdataset

    def documents(blocks: Iterator[dict[str, Any]]) -> Documents:
        for block in blocks:
            start = 0
            for end in block["ends.npy"].tolist():
                yield block["ids.npy"][start:end]
                start = end

    urls = sorted(map(str, (folder / "tokens").glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
    pipeline = dataset.decode().compose(documents).shuffle(SHUFFLE_DOCUMENTS, seed=0).repeat()
    return iter(pipeline)


def webdataset_documents(folder: Path) -> Documents:
    import webdataset

    urls = sorted(map(str, (folder / "documents").glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
    pipeline = dataset.shuffle(SHUFFLE_DOCUMENTS, seed=0).decode().repeat()
    return (sample["npy"] for sample in pipeline)


def _parquet(folder: Path) -> Any:
    from datasets import load_dataset

    files = sorted(map(str, (folder / "parquet").glob("*.parquet")))
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


def datasets_shuffled(folder: Path) -> Documents:
    dataset = _parquet(folder).shuffle(seed=0, buffer_size=SHUFFLE_DOCUMENTS).with_format("numpy")
    while True:
        for example in dataset:
            yield example["input_ids"]


def datasets_arrow(folder: Path) -> Documents:
    dataset = _parquet(folder).with_format("arrow")
    while True:
        for table in dataset.iter(batch_size=ARROW_BATCH_DOCUMENTS):
            for chunk in table["input_ids"].chunks:
                values = chunk.values.to_numpy()
                offsets = chunk.offsets.to_numpy().tolist()
                for start, end in pairwise(offsets):
                    yield values[start:end]


def mosaicml_streaming(folder: Path) -> Documents:
    import mosaic

    return mosaic.documents(folder / "mds", SHUFFLE_DOCUMENTS)


CONTESTANTS: dict[str, Callable[[Path], Documents]] = {
    "webdataset": webdataset_blocks,
    "webdataset-documents": webdataset_documents,
    "datasets": datasets_shuffled,
    "datasets-arrow": datasets_arrow,
    "mosaicml-streaming": mosaicml_streaming,
}


def dstrain_steps(folder: Path, shape: BatchShape, lanes: int, prefetch_steps: int) -> Iterator[object]:
    from dstrain.data.masking import Vocabulary
    from dstrain.data.producer import StreamSpec
    from dstrain.data.stream import RowStream

    spec = StreamSpec(
        corpus=str(folder / "tokens"),
        sequence_length=shape.row_tokens,
        lanes=lanes,
        global_batch_rows=shape.rows,
        seed=0,
        shuffle_window=SHUFFLE_DOCUMENTS,
        masking_rate=shape.masking_rate,
        masking_replace=REPLACE,
        tokenizer=None,
        vocabulary=Vocabulary(VOCAB_SIZE, MASK_ID, tuple(range(MASK_ID + 1))),
    )
    return RowStream(spec, 0, 1, prefetch_steps=prefetch_steps)


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    folder = Path(settings["folder"])
    shape = BatchShape(settings["rows"], settings["row_tokens"], settings["masking_rate"])
    started = time.perf_counter()
    made: Iterator[object]
    if name.startswith("dstrain"):
        made = dstrain_steps(folder, shape, settings["lanes"], 4 if name == "dstrain-background" else 0)
    else:
        made = batches(CONTESTANTS[name](folder), shape)
    next(made)
    first_batch_seconds = time.perf_counter() - started
    for _ in range(settings["warmup_batches"]):
        next(made)
    count, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < settings["seconds"]:
        next(made)
        count += 1
    wall_seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    tokens = count * shape.rows * shape.row_tokens
    print(
        json.dumps(
            {
                "tokens_per_second": tokens / wall_seconds,
                "tokens_per_cpu_second": tokens / cpu_seconds,
                "first_batch_seconds": first_batch_seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
