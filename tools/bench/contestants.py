"""One contestant of the stream benchmark in one process: `python contestants.py NAME '{…}'` prints its speed as JSON.

Each one is written the way its own documentation does it, in its fastest form:

    dstrain               token shards, rows made in this process, with digests
    dstrain-mixture       the same documents dealt out to eight sources with eight weights
    dstrain-background    the rows of `dstrain` from the background process, this process only receives them
    webdataset            the same token shards: blocks of documents, decoded by webdataset, taken apart, shuffled
    webdataset-documents  one sample per document, as WebDataset users store text
    datasets              Parquet, streaming, shuffled
    datasets-arrow        Parquet, streaming, whole Arrow batches and no shuffle: the upper bound of `datasets`
    mosaicml-streaming    MDS shards, shuffled (py1e)
    litdata               chunks of one sample per document, shuffled
    litdata-tokens        `TokensLoader`: chunks of documents end to end, read as rows, shuffled row by row
    grain                 ArrayRecord, one record per document, in random order over the whole corpus
    grain-packing         the same, packed and batched by Grain itself

The last five run under virtual environments of their own.
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
from packing import Batch, BatchShape, batches, batches_of_rows, masked_batches

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
    import peer_mosaic

    return peer_mosaic.documents(folder / "mosaicml-streaming")


def litdata_documents(folder: Path) -> Documents:
    import peer_litdata

    return peer_litdata.documents(folder / "litdata")


def litdata_tokens(folder: Path, shape: BatchShape) -> Iterator[Batch]:
    import peer_litdata

    return batches_of_rows(peer_litdata.rows(folder / "litdata", shape.row_tokens), shape)


def grain_documents(folder: Path) -> Documents:
    import peer_grain

    return peer_grain.documents(folder / "grain")


def grain_packing(folder: Path, shape: BatchShape) -> Iterator[Batch]:
    import peer_grain

    return masked_batches(peer_grain.packed_batches(folder / "grain", shape.rows, shape.row_tokens), shape)


READERS: dict[str, Callable[[Path], Documents]] = {
    "webdataset": webdataset_blocks,
    "webdataset-documents": webdataset_documents,
    "datasets": datasets_shuffled,
    "datasets-arrow": datasets_arrow,
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata_documents,
    "grain": grain_documents,
}
PACKERS: dict[str, Callable[[Path, BatchShape], Iterator[Batch]]] = {
    "litdata-tokens": litdata_tokens,
    "grain-packing": grain_packing,
}


def dstrain_steps(name: str, folder: Path, shape: BatchShape, lanes: int) -> Iterator[object]:
    from specs import MIXTURE_WEIGHTS, mixture_folders, stream_spec

    from dstrain.data.stream import RowStream

    mixed = name == "dstrain-mixture"
    spec = stream_spec(
        mixture_folders(folder) if mixed else (folder / "tokens",),
        weights=MIXTURE_WEIGHTS if mixed else (1.0,),
        rows=shape.rows,
        row_tokens=shape.row_tokens,
        lanes=lanes,
        masking_rate=shape.masking_rate,
    )
    return RowStream(spec, 0, 1, prefetch_steps=4 if name == "dstrain-background" else 0)


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    folder = Path(settings["folder"])
    shape = BatchShape(settings["rows"], settings["row_tokens"], settings["masking_rate"])
    started = time.perf_counter()
    made: Iterator[object]
    if name.startswith("dstrain"):
        made = dstrain_steps(name, folder, shape, settings["lanes"])
    elif name in PACKERS:
        made = PACKERS[name](folder, shape)
    else:
        made = batches(READERS[name](folder), shape)
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
