"""A file written past the page cache: while a block is filled, the one before it is on its way to the disk.

    data ─ copy ─► block 0   block 1   block 2 ─► block 0 …
                      └─ write ─┘

A buffered write copies into the page cache, at several times the processor time of a plain copy, and drives out what
training reads. Where a file system has no direct writes, they are buffered.
"""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

BLOCK_BYTES = 1 << 23
_BLOCKS = 3
_SECTOR_BYTES = 4096  # what a direct write has to be a multiple of, in memory and in the file


class StreamedFile:
    """`with StreamedFile(path) as file: file.write(…)`; afterwards it is on the disk.

    Raises OSError, from whichever call comes next: the disk is full, gone or not writable.
    """

    def __init__(self, path: Path) -> None:
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
        self._under_way: list[Future[None] | None] = [None for _ in blocks]
        self._current = self._filled = 0
        self._writer = ThreadPoolExecutor(1)

    def write(self, content: bytes | memoryview) -> None:
        """Append some bytes. They are copied before this returns."""
        if not content:
            return
        # torch's copy lets other threads run, a memoryview's would not; it takes no buffer that is read-only
        writable = bytearray(content) if memoryview(content).readonly else content
        data = torch.frombuffer(writable, dtype=torch.uint8)
        done = 0
        while done < data.numel():
            count = min(BLOCK_BYTES - self._filled, data.numel() - done)
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
                for number in range(_BLOCKS):
                    self._settle(number)
                os.fsync(self._descriptor)
        finally:
            self._writer.shutdown()
            os.close(self._descriptor)

    def _send(self) -> None:
        """Write the current block, and go on with the next, once it is free."""
        view = self._views[self._current][: self._filled]
        self._under_way[self._current] = self._writer.submit(self._put, view)
        self._current, self._filled = (self._current + 1) % _BLOCKS, 0
        self._settle(self._current)

    def _settle(self, number: int) -> None:
        """Wait until a block is written; raises what went wrong."""
        writing, self._under_way[number] = self._under_way[number], None
        if writing is not None:
            writing.result()

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
