"""mosaicml-streaming for the stream benchmark: runs in a virtual environment of its own, without this project.

`python peer_mosaic.py IDS ENDS OUT` writes documents as MDS shards.
"""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 1 << 23  # as large as all others'
DOCUMENTS_AHEAD = 512


def import_streaming() -> ModuleType:
    """The library. It imports torchvision only for its image datasets, and PyPI's fails beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        stand_ins: dict[str, dict[str, Any]] = {
            "torchvision": {},
            "torchvision.datasets": {"VisionDataset": object},
            "torchvision.transforms": {},
            "torchvision.transforms.functional": {"to_tensor": None},
        }
        for name, content in stand_ins.items():
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__dict__.update(content, __spec__=ModuleSpec(name, None))
    import streaming

    return streaming


def write(ids: NDArray[np.uint16], ends: NDArray[np.int64], out: Path) -> None:
    """One MDS sample per document."""
    streaming = import_streaming()
    with streaming.MDSWriter(out=str(out), columns={"input_ids": "ndarray:uint16"}, size_limit=SHARD_BYTES) as writer:
        start = 0
        for end in ends.tolist():
            writer.write({"input_ids": ids[start:end]})
            start = end


def documents(folder: Path) -> Iterator[NDArray[np.integer]]:
    """All documents, shuffled (py1e, in blocks of the default size), epoch after epoch."""
    # By default it looks 8 batches ahead, and waits by the clock for what it looked for: with documents one by one that
    # is a tenth of the speed.
    dataset = import_streaming().StreamingDataset(
        local=str(folder), shuffle=True, shuffle_seed=0, batch_size=1, predownload=DOCUMENTS_AHEAD
    )
    while True:
        for sample in dataset:
            yield sample["input_ids"]


if __name__ == "__main__":
    write(np.load(sys.argv[1]), np.load(sys.argv[2]), Path(sys.argv[3]))
