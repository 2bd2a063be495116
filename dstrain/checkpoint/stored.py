"""Reading parts of a checkpoint in a store: whole blocks, each checked against its digest in the manifest.

    wanted bytes ──► blocks of 8 MiB that they are in ──► fetched a few ahead ──► digest right? ──► copied

So a rank reads what it needs, and nothing that it uses is unverified. A file without digests of blocks (a checkpoint
that an older version made, copied to a store) has to be verified as a whole before.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import xxhash

from dstrain.base.store import StorePath
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.scan import Header, parsed_header
from dstrain.errors import CheckpointError

AHEAD = 8  # blocks that are fetched at once
KEPT = 16  # blocks that were used last: neighbours share them
Block = tuple[str, int]  # of a file; its number


class DamagedError(CheckpointError):
    """Bytes that are not what was written."""


def has_blocks(stated: dict[str, Any]) -> bool:
    """Whether the manifest's entry of a file has digests of its parts."""
    return "blocks" in stated and "head" in stated


def stored_header(folder: StorePath, name: str, stated: dict[str, Any]) -> tuple[int, Header]:
    """The bytes before the first tensor, and the header of a safetensors file, checked.

    Raises:
        DamagedError: it is not what was written.
        OSError: it cannot be read.
    """
    if has_blocks(stated):
        size, digest = stated["head"]
        head = (folder / name).read_range(0, size)
        if xxhash.xxh3_128_hexdigest(head) != digest:
            raise DamagedError(f"{folder / name}: its header changed since it was written")
    else:
        path = folder / name
        (length,) = struct.unpack("<Q", path.read_range(0, 8))
        size = 8 + int(length)
        head = path.read_range(0, min(size, stated["bytes"]))
    return size, parsed_header(head)


def stored_headers(folder: StorePath, manifest: Manifest) -> dict[str, tuple[int, Header]]:
    """Those of all files."""
    with ThreadPoolExecutor(2 * AHEAD) as pool:
        read = pool.map(lambda name: stored_header(folder, name, manifest.files[name]), manifest.files)
        return dict(zip(manifest.files, read, strict=True))


class StoredBlocks:
    """The files of one checkpoint, by block. Used by one thread; fetches with several."""

    def __init__(self, folder: StorePath, manifest: Manifest) -> None:
        self._folder, self._files = folder, manifest.files
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="store")
        self._planned: list[Block] = []  # last one first
        self._coming: dict[Block, Future[bytes]] = {}
        self._used: OrderedDict[Block, bytes] = OrderedDict()

    def plan(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Which bytes (file, first, stop) will be read, in this order: their blocks are fetched ahead."""
        blocks = [
            (name, number)
            for name, first, stop in ranges
            for number in range(first // self._block_bytes(name), -(-stop // self._block_bytes(name)))
        ]
        self._planned = list(dict.fromkeys(blocks))[::-1]

    def read_into(self, name: str, first: int, raw: memoryview) -> None:
        """Fill `raw` with a file's bytes from `first` on.

        Raises:
            DamagedError: a block is not what was written.
            OSError: it cannot be read.
        """
        size = self._block_bytes(name)
        while raw:
            block = self._block((name, first // size))
            part = memoryview(block)[first % size :][: len(raw)]
            if not part:
                raise DamagedError(f"{self._folder / name}: ends at byte {first:,}, too early")
            raw[: len(part)] = part
            raw, first = raw[len(part) :], first + len(part)

    def close(self) -> None:
        """Fetch no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _block(self, block: Block) -> bytes:
        if block in self._used:
            self._used.move_to_end(block)
            return self._used[block]
        coming = self._coming.pop(block, None) or self._pool.submit(self._fetch, block)
        while self._planned and len(self._coming) < AHEAD:
            following = self._planned.pop()
            if following != block and following not in self._used and following not in self._coming:
                self._coming[following] = self._pool.submit(self._fetch, following)
        self._used[block] = coming.result()
        if len(self._used) > KEPT:
            self._used.popitem(last=False)
        return self._used[block]

    def _fetch(self, block: Block) -> bytes:
        name, number = block
        stated, size = self._files[name], self._block_bytes(name)
        content = (self._folder / name).read_range(number * size, min((number + 1) * size, stated["bytes"]))
        if has_blocks(stated) and xxhash.xxh3_128_hexdigest(content) != stated["blocks"][number]:
            raise DamagedError(f"{self._folder / name}: block {number} changed since it was written")
        return content

    def _block_bytes(self, name: str) -> int:
        return int(self._files[name].get("block_bytes", 1 << 23))
