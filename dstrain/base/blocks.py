"""Files by blocks, each compared with its digest before any of its bytes is handed out.

    MappedFile     a file of this machine in memory: views, a block checked at its first use        (shards)
    BlockReader    ranges of files of any storage, whole blocks read a few ahead by threads         (checkpoints)

So no use of a file relies on an earlier look at it: what was verified an hour ago may have changed since.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dstrain.base.storage import Place, storage_of

DIGEST_BYTES = 16  # XXH3, 128 bits
KEPT = 2  # blocks that were used last: neighbours share them


class DamagedBlockError(Exception):
    """Bytes that are not what was written. `block` says where they are."""

    def __init__(self, place: object, number: int, first: int, stop: int) -> None:
        self.block = f"{place}: block {number} (bytes {first:,} to {stop:,})"
        super().__init__(f"{self.block} is not what was written; restore the file from a copy")


@dataclass(frozen=True)
class BlockDigests:
    """The size of a file, and the digests of its blocks, one after the other; the last block is the shorter one."""

    total_bytes: int
    block_bytes: int
    digests: bytes

    def __post_init__(self) -> None:
        """Refuse digests of another file. Raises ValueError."""
        if self.block_bytes <= 0:
            raise ValueError(f"blocks of {self.block_bytes} bytes")
        if len(self.digests) != self.count * DIGEST_BYTES:
            raise ValueError(f"{len(self.digests)} bytes of digests for {self.count} blocks")

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return -(-self.total_bytes // self.block_bytes)

    def span(self, number: int) -> tuple[int, int]:
        """The first byte of a block, and the one after its last."""
        return number * self.block_bytes, min((number + 1) * self.block_bytes, self.total_bytes)

    def require(self, place: object, number: int, content: bytes | memoryview) -> None:
        """Raise DamagedBlockError if that is not what a block has to be. Each byte is hashed once."""
        if xxhash.xxh3_128_digest(content) != self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
            raise DamagedBlockError(place, number, *self.span(number))


class MappedFile:
    """A file mapped into memory. What `checked` has a 1 for was compared with its digest."""

    def __init__(self, path: Path, digests: BlockDigests) -> None:
        """Map it. Raises OSError where that cannot be done, ValueError where it has another size."""
        self._path, self._digests = path, digests
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != digests.total_bytes:
                raise ValueError(f"{size} bytes and not {digests.total_bytes}")
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.checked = bytearray(digests.count)

    @property
    def memory_bytes(self) -> int:
        """What this takes of the process' own memory; the map is the system's."""
        return len(self._digests.digests) + len(self.checked)

    def check(self, first: int, stop: int) -> None:
        """Compare the blocks that hold the bytes first … stop-1, each of them once. Raises DamagedBlockError."""
        size = self._digests.block_bytes
        last = -(-stop // size)
        block = self.checked.find(0, first // size, last)
        while block >= 0:
            start, end = self._digests.span(block)
            with memoryview(self.mapped) as view, view[start:end] as content:
                self._digests.require(self._path, block, content)
            self.checked[block] = 1
            block = self.checked.find(0, block + 1, last)

    def read(self, first: int, size: int) -> bytes:
        """Some bytes, checked. Raises DamagedBlockError."""
        self.check(first, first + size)
        return self.mapped[first : first + size]


_Block = tuple[str, int]  # of a file; its number


class BlockReader:
    """Ranges of the files of one folder. Used by one thread at a time; reads with several.

    wanted ranges ──► the blocks that they are in ──► read a few ahead ──► digest right? ──► copied
    """

    def __init__(self, folder: Place, files: Mapping[str, BlockDigests]) -> None:
        self._folder, self._files = folder, files
        self._ahead = storage_of(folder)[0].reads_at_once
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="blocks")
        self._planned: list[_Block] = []  # last one first
        self._coming: dict[_Block, Future[bytes]] = {}
        self._used: OrderedDict[_Block, bytes] = OrderedDict()

    def plan(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Which bytes (file, first, stop) will be read, in this order: their blocks are read ahead."""
        blocks = [
            (name, number)
            for name, first, stop in ranges
            for number in range(first // self._files[name].block_bytes, -(-stop // self._files[name].block_bytes))
        ]
        self._planned = list(dict.fromkeys(blocks))[::-1]

    def read_into(self, name: str, first: int, raw: memoryview) -> None:
        """Fill `raw` with a file's bytes from `first` on; they have to be within the file.

        Raises:
            DamagedBlockError: a block is not what was written.
            OSError: it cannot be read.
        """
        size = self._files[name].block_bytes
        while raw:
            block = self._block((name, first // size))
            part = memoryview(block)[first % size :][: len(raw)]
            assert part, f"{name} has no byte {first}"
            raw[: len(part)] = part
            raw, first = raw[len(part) :], first + len(part)

    def _block(self, block: _Block) -> bytes:
        if block in self._used:
            self._used.move_to_end(block)
            return self._used[block]
        coming = self._coming.pop(block, None) or self._pool.submit(self._read, block)
        while self._planned and len(self._coming) < self._ahead:
            following = self._planned.pop()
            if following != block and following not in self._used and following not in self._coming:
                self._coming[following] = self._pool.submit(self._read, following)
        self._used[block] = coming.result()
        if len(self._used) > KEPT:
            self._used.popitem(last=False)
        return self._used[block]

    def _read(self, block: _Block) -> bytes:
        name, number = block
        digests, path = self._files[name], self._folder / name
        storage, url = storage_of(path)
        content = storage.read(url, *digests.span(number))
        digests.require(path, number, content)
        return content
