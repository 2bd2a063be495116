"""The rows of one rank as an iterator, made in this process or ahead of time in one background process.

What comes out does not depend on which, nor on how far ahead: a step's rows are a function of spec, rank and step.

    rank's process                          data process (worker.py)
    RowStream ── slot free ──────────────►  RankRows.make(slot)
              ◄── step 17 is ready ───────
    numpy views of slot 17 mod slots        one unnamed memory, mapped by both
"""

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import dstrain
from dstrain import errors
from dstrain.base.processes import start
from dstrain.data.layout import Layout
from dstrain.data.producer import RankRows, largest_step_bytes, step_shape
from dstrain.data.rows import StepBuffer, StepRows
from dstrain.data.spec import StreamSpec

SLOT_ALIGNMENT = 64  # bytes: a cache line
# The package is found where this process found it, and the working folder is kept out of the way.
WORKER_PROGRAM = """
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
from dstrain.data.worker import main
main(sys.argv[1:])
"""


class DataProcessError(RuntimeError):
    """The data process of this rank has died. `data_process_exit_code` is negative for a signal."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.data_process_exit_code = exit_code


class RowStream:
    """Iterates over the `StepRows` of rank `rank` of `world`, from data step `first_step` on, without end.

    With `prefetch_steps` of 0 the rows are made in this process, otherwise in one background process, at most that many
    steps ahead. The arrays of a step are valid until the next one is asked for. Raises CorpusError from the
    constructor or from `next`, DataProcessError when the background process died. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        spec: StreamSpec,
        rank: int,
        world: int,
        *,
        first_step: int | None = None,
        prefetch_steps: int = 0,
    ) -> None:
        """`first_step` of None is the first of the spec."""
        first_step = spec.first_step if first_step is None else first_step
        self._source: _Source
        if prefetch_steps == 0:
            self._source = _InProcess(spec, rank, world, first_step)
        else:
            self._source = _InBackground(spec, rank, world, first_step, prefetch_steps)
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
    def __init__(self, spec: StreamSpec, rank: int, world: int, first_step: int) -> None:
        self._rows = RankRows(spec, rank, world, first_step)
        self._memory = bytearray(self._rows.buffer_bytes)
        self._step = first_step

    def next(self) -> StepRows:
        buffer = StepBuffer(self._rows.shape(self._step), self._memory)
        self._rows.make(buffer)
        self._step += 1
        return buffer.rows()

    def close(self) -> None:
        pass


class _InBackground:
    def __init__(self, spec: StreamSpec, rank: int, world: int, first_step: int, prefetch_steps: int) -> None:
        self._spec, self._rank, self._world, self._layout = spec, rank, world, Layout(spec)
        self._slots = prefetch_steps + 1  # one is in the consumer's hands
        largest = largest_step_bytes(spec, self._layout, rank, world)
        self._slot_bytes = -(-largest // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        # Unnamed memory: nothing is left behind in /dev/shm, whoever is killed.
        memory_fd = os.memfd_create("dstrain-rows")
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(memory_fd, self._slots * self._slot_bytes)
            self._memory = memoryview(mmap.mmap(memory_fd, 0))
            package_folder = str(Path(dstrain.__file__).parent.parent)
            self._process = start(
                [
                    sys.executable,
                    "-c",
                    WORKER_PROGRAM,
                    package_folder,
                    str(theirs.fileno()),
                    str(memory_fd),
                    str(os.getpid()),
                ],
                descriptors=(theirs.fileno(), memory_fd),
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
            "slots": self._slots,
            "slot_bytes": self._slot_bytes,
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
        step: int = message["step"]
        shape = step_shape(self._spec, self._layout.phase_at(step), self._rank, self._world)
        return StepBuffer(shape, self._memory[step % self._slots * self._slot_bytes :]).rows()

    def close(self) -> None:
        self._connection.close()
        self._process.kill()  # it holds nothing that could be left half done
        self._process.wait()

    def _send(self, message: bytes) -> None:
        # If it has died, perhaps after sending its last words, the next receive finds out.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(message)

    def _death(self) -> DataProcessError:
        self._connection.close()
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        return DataProcessError(
            status,
            f"the data process (pid {self._process.pid}) {how}; if nobody killed it, the machine may be out of "
            "memory: see `dmesg`",
        )
