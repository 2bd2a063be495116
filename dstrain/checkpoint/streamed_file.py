"""A file written past the page cache: while a block is filled, the one before it is hashed and on its way to the disk.

    pieces ─ copy ─► block 0   block 1   block 2 ─► block 0 …
                        └ hash, write ┘

A buffered write copies into the page cache, at several times the processor time of a plain copy, and drives out what
training reads. Where a file system has no direct writes, they are buffered.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 23
_BLOCKS = 3
_SECTOR_BYTES = 4096  # what a direct write has to be a multiple of, in memory and in the file


class StreamedFile:
    """`with StreamedFile(path, digest.update) as file: file.write(…)`; afterwards it is on the disk.

    `hash` is given all blocks in their order, by a thread of its own.

    Raises OSError, from whichever call comes next: the disk is full, gone or not writable.
    """

    def __init__(self, path: Path, hash: Callable[[memoryview], object]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)
        blocks = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(_BLOCKS)]  # at the start of a page
        self._views = [memoryview(block) for block in blocks]
        self._blocks = [torch.frombuffer(block, dtype=torch.uint8) for block in blocks]
        self._under_way: list[list[Future[Any]]] = [[] for _ in blocks]
        self._current = self._filled = 0
        self._hash = hash
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def write(self, data: Tensor) -> None:
        """Append 1-D uint8 data that is on the host."""
        done = 0
        while done < data.numel():
            count = min(BLOCK_BYTES - self._filled, data.numel() - done)
            # torch's copy lets other threads run, a memoryview's would not
            self._blocks[self._current][self._filled : self._filled + count].copy_(data[done : done + count])
            self._filled, done = self._filled + count, done + count
            if self._filled == BLOCK_BYTES:
                self._send()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._send()
                for under_way in self._under_way:
                    _settle(under_way)
                os.fsync(self._descriptor)
        finally:
            self._hasher.shutdown()
            self._writer.shutdown()
            os.close(self._descriptor)

    def _send(self) -> None:
        """Hash and write the current block, and go on with the next, once it is free."""
        view = self._views[self._current][: self._filled]
        self._under_way[self._current] = [
            self._hasher.submit(self._hash, view),
            self._writer.submit(self._put, view),
        ]
        self._current, self._filled = (self._current + 1) % _BLOCKS, 0
        _settle(self._under_way[self._current])

    def _put(self, view: memoryview) -> None:
        while view:
            if len(view) % _SECTOR_BYTES:  # the file's end, or what follows a short write
                self._buffered()
            try:
                view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._buffered():
                    raise

    def _buffered(self) -> bool:
        """Write through the page cache from now on; False if that was so already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)


def _settle(under_way: list[Future[Any]]) -> None:
    """Wait for the hash and the write of a block; raises what went wrong."""
    while under_way:
        under_way.pop().result()
