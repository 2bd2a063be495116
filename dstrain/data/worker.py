"""The background process that makes a rank's rows ahead of time. It imports neither torch nor the rank's program.

It writes steps into the slots of a shared, unnamed piece of memory, and says over a socket when one is ready. An
empty message from the rank gives a slot back. When the rank goes, however it goes, the socket closes and this
process ends.
"""

import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from dstrain.base.environment import ONE_THREAD, override

WATCH_SECONDS = 1.0
# Sent to a whole process group to stop a run: what that means is the rank's to decide, and it still needs rows.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: list[str]) -> None:
    """Serve one rank until its socket closes. Arguments: the socket, the shared memory, the rank's process id."""
    socket_fd, memory_fd, parent = (int(argument) for argument in arguments)
    for ignored in IGNORED_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    override(ONE_THREAD)  # before numpy and tokenizers are imported: each core belongs to a rank
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    connection = Connection(socket_fd)
    try:
        _serve(connection, memory_fd)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the rank is gone


def _serve(connection: Connection, memory_fd: int) -> None:
    from dstrain.data.producer import RankRows
    from dstrain.data.rows import StepBuffer
    from dstrain.data.spec import StreamSpec
    from dstrain.errors import UserError

    request = json.loads(connection.recv_bytes())
    memory = memoryview(mmap.mmap(memory_fd, 0))
    slots, slot_bytes, step = request["slots"], request["slot_bytes"], request["first_step"]
    try:
        rows = RankRows(StreamSpec.from_json(request["spec"]), request["rank"], request["world"], step)
        free = slots
        while True:
            while free == 0 or connection.poll():
                connection.recv_bytes()
                free += 1
            rows.make(StepBuffer(rows.shape(step), memory[step % slots * slot_bytes :]))
            connection.send_bytes(json.dumps({"step": step}).encode())
            step, free = step + 1, free - 1
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except UserError as error:
        connection.send_bytes(json.dumps({"error": type(error).__name__, "message": str(error)}).encode())
    except Exception:
        connection.send_bytes(json.dumps({"error": "RuntimeError", "message": traceback.format_exc()}).encode())


def _watch(parent: int) -> None:
    """End with the rank even while a step takes long, or when another process holds the rank's end of the socket."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(0)
