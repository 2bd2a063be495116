"""The rows of one rank as an iterator, made in this process or ahead of time in one background process.

What comes out does not depend on which, nor on how far ahead: a step's rows are a function of the spec, the rank, and
the cursors that the stream started from; the cursors after a step travel with it.

    rank's process                          data process (worker.py)
    RowStream ── slot free ──────────────►  RankRows.make(step, slot)
              ◄── step 17 is ready ───────
    numpy views of slot 17 mod slots        one unnamed memory, mapped by both
"""

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

import dstrain
from dstrain import errors
from dstrain.data.producer import RankRows, StreamSpec, step_shape
from dstrain.data.rows import StepBuffer, StepRows

SLOT_ALIGNMENT = 64  # bytes: a cache line
# The package is found where this process found it, and the working folder is kept out of the way.
WORKER_PROGRAM = """
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
from dstrain.data.worker import main
main(sys.argv[1:])
"""


class RowStream:
    """Iterates over the `StepRows` of rank `rank` of `world`, from global step `first_step` on, without end.

    `cursors` (lanes of the run, 3) say where the lanes stood before that step; None is the start of the run. With
    `prefetch_steps` of 0 the rows are made in this process, otherwise in one background process, at most that many
    steps ahead. The arrays of a step are valid until the next one is asked for. Raises CorpusError from the
    constructor or from `next`, RuntimeError when the background process died. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        spec: StreamSpec,
        rank: int,
        world: int,
        *,
        first_step: int = 0,
        cursors: NDArray[np.int64] | None = None,
        prefetch_steps: int = 0,
    ) -> None:
        self._source: _Source
        if prefetch_steps == 0:
            self._source = _InProcess(spec, rank, world, first_step, cursors)
        else:
            self._source = _InBackground(spec, rank, world, first_step, cursors, prefetch_steps)
        self.seconds_waited = 0.0  # for the step that was handed out last

    def __iter__(self) -> Iterator[StepRows]:
        return self

    def __next__(self) -> StepRows:
        started = time.perf_counter()
        rows = self._source.next()
        self.seconds_waited = time.perf_counter() - started
        return rows

    def close(self) -> None:
        """End the background process. Views of the last step stay readable."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Source(Protocol):
    def next(self) -> StepRows: ...

    def close(self) -> None: ...


class _InProcess:
    def __init__(
        self, spec: StreamSpec, rank: int, world: int, first_step: int, cursors: NDArray[np.int64] | None
    ) -> None:
        self._rows = RankRows(spec, rank, world, cursors)
        self._buffer = StepBuffer(self._rows.shape, bytearray(self._rows.shape.bytes))
        self._step = first_step

    def next(self) -> StepRows:
        reports = self._rows.make(self._step, self._buffer)
        self._step += 1
        return self._buffer.rows(reports)

    def close(self) -> None:
        pass


class _InBackground:
    def __init__(
        self,
        spec: StreamSpec,
        rank: int,
        world: int,
        first_step: int,
        cursors: NDArray[np.int64] | None,
        prefetch_steps: int,
    ) -> None:
        shape = step_shape(spec, world)
        slots = prefetch_steps + 1  # one is in the consumer's hands
        slot_bytes = -(-shape.bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        # Unnamed memory: nothing is left behind in /dev/shm, whoever is killed.
        memory_fd = os.memfd_create("dstrain-rows")
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(memory_fd, slots * slot_bytes)
            memory = memoryview(mmap.mmap(memory_fd, 0))
            self._buffers = [StepBuffer(shape, memory[slot * slot_bytes :]) for slot in range(slots)]
            package_folder = str(Path(dstrain.__file__).parent.parent)
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    WORKER_PROGRAM,
                    package_folder,
                    str(theirs.fileno()),
                    str(memory_fd),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory_fd),
            )
        finally:
            os.close(memory_fd)
            theirs.close()
        self._connection = Connection(ours.detach())
        self._in_use = False
        request = {
            "spec": spec.to_json(),
            "rank": rank,
            "world": world,
            "first_step": first_step,
            "cursors": None if cursors is None else cursors.tolist(),
            "slots": slots,
            "slot_bytes": slot_bytes,
        }
        self._send(json.dumps(request).encode())

    def next(self) -> StepRows:
        if self._connection.closed:
            raise StopIteration
        if self._in_use:
            self._send(b"")
        try:
            message = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if "error" in message:
            self.close()
            kind: type[Exception] = getattr(errors, message["error"], RuntimeError)
            raise kind(message["message"])
        self._in_use = True
        buffer: StepBuffer = self._buffers[message["step"] % len(self._buffers)]
        return buffer.rows(tuple(message["reports"]))

    def close(self) -> None:
        self._connection.close()
        self._process.kill()  # it holds nothing that could be left half done
        self._process.wait()

    def _send(self, message: bytes) -> None:
        # If it has died, perhaps after sending its last words, the next receive finds out.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(message)

    def _death(self) -> RuntimeError:
        self._connection.close()
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        return RuntimeError(
            f"the data process (pid {self._process.pid}) {how}; if nobody killed it, the machine may be out of "
            "memory: see `dmesg`"
        )
