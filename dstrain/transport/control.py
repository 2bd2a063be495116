"""The line of control between the supervisor and an agent: standard input, over whatever transport.

The supervisor writes a line every few seconds: the time of its monotonic clock, or `stop`. An agent that reads the end
of its input, or nothing for a while, has lost its supervisor. It must not go on then, as another attempt may already be
writing into the same folder, so it kills its ranks and itself. Signals would need a terminal over ssh, and do not
report a lost link.
"""

import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

STOP = b"stop\n"
BEAT_EVERY_SECONDS = 5.0
SILENCE_SECONDS = 120.0  # a link may be down for a minute without costing the run
_BEAT = re.compile(rb"t(\d+\.\d{6})")


def beat() -> bytes:
    """A sign of life: this machine's monotonic clock."""
    return b"t%.6f\n" % time.monotonic()


@dataclass
class Clock:
    """How far this machine's monotonic clock is ahead of the supervisor's; too far by the shortest delay of a line."""

    ahead_seconds: float | None = None

    def hear(self, line: bytes) -> None:
        """Take in a sign of life."""
        if beaten := _BEAT.fullmatch(line):  # not so after a write that was cut short
            ahead = time.monotonic() - float(beaten[1])
            self.ahead_seconds = ahead if self.ahead_seconds is None else min(ahead, self.ahead_seconds)


def take_standard_input() -> int:
    """Move standard input to a descriptor that ranks do not inherit, and put an empty one in its place."""
    descriptor = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return descriptor


def listen(
    descriptor: int, lost: Callable[[str], None], clock: Clock, silence_seconds: float = SILENCE_SECONDS
) -> threading.Thread:
    """Read the line in a thread: `stop` becomes this process's SIGTERM; its end or silence is told to `lost`, once."""

    def follow() -> None:
        pending = b""
        while select.select([descriptor], [], [], silence_seconds)[0]:
            received = os.read(descriptor, 4096)
            if not received:
                lost("the supervisor is gone")
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                clock.hear(line)
            if STOP.rstrip() in lines:
                os.kill(os.getpid(), signal.SIGTERM)
        lost(f"nothing was heard of the supervisor for {silence_seconds:.0f} s")

    thread = threading.Thread(target=follow, name="control", daemon=True)
    thread.start()
    return thread
