"""Checkpoint files: safetensors written in one pass while they are hashed."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from dstrain.base.storage import Place, storage_of

# Names of the format: https://huggingface.co/docs/safetensors
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_BLOCK_BYTES = 1 << 24
DIGEST_BYTES = 1 << 23  # of a file that have a digest of their own


@dataclass(frozen=True)
class Written:
    """What a file came to, as a manifest states it.

    `blocks` are digests (XXH3, 128 bits) of each DIGEST_BYTES of the file, the last one shorter: what is read in part
    can be checked in part. `head` is the same of length and header alone.
    """

    bytes: int
    sha256: str
    head: tuple[int, str]
    blocks: list[str]

    def entry(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bytes": self.bytes,
            "sha256": self.sha256,
            "head": list(self.head),
            "block_bytes": DIGEST_BYTES,
            "blocks": self.blocks,
        }


def write_safetensors(path: Place, pieces: Iterable[tuple[str, Tensor]]) -> Written:
    """Write 1-D tensors in the safetensors format, hashing on the way, and flush them to the disk.

    The library's own writer takes a dict of everything and needs a second read for a digest. Needs no more memory than
    one tensor's, and that only for tensors that are not on the host; for a store, a part of an upload besides.

    Raises:
        OSError: the disk is full, gone or not writable, or the store is.
    """
    # Widest types first, as the library does it: then every tensor starts at a multiple of its element's size.
    tensors = sorted(pieces, key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the first tensor starts aligned, and so all do
    head = bytearray(struct.pack("<Q", len(encoded)) + encoded)
    digests = _Digests()

    def blocks() -> Iterator[memoryview]:
        yield memoryview(head)
        for _, tensor in tensors:
            raw = memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
            for first in range(0, len(raw), _BLOCK_BYTES):
                yield raw[first : first + _BLOCK_BYTES]

    with ThreadPoolExecutor(1) as beside:

        def hashed() -> Iterator[memoryview]:
            digests.begin()
            for block in blocks():
                hashing = beside.submit(digests.update, block)
                yield block
                hashing.result()

        storage, url = storage_of(path)
        storage.write(url, hashed, len(head) + end)
    return Written(
        len(head) + end, digests.whole.hexdigest(), (len(head), xxhash.xxh3_128_hexdigest(head)), digests.of_blocks()
    )


class _Digests:
    """Of a whole file and of each block of it, while it is written."""

    def begin(self) -> None:
        """A file begins, or begins anew."""
        self.whole = hashlib.sha256()
        self._done: list[str] = []
        self._block, self._room = xxhash.xxh3_128(), DIGEST_BYTES

    def update(self, data: bytes | memoryview) -> None:
        """What follows."""
        self.whole.update(data)
        view = memoryview(data)
        while view:
            part = view[: self._room]
            self._block.update(part)
            self._room -= len(part)
            view = view[len(part) :]
            if not self._room:
                self._done.append(self._block.hexdigest())
                self._block, self._room = xxhash.xxh3_128(), DIGEST_BYTES

    def of_blocks(self) -> list[str]:
        """Of all blocks, the last one included."""
        return self._done + ([self._block.hexdigest()] if self._room < DIGEST_BYTES else [])
