"""The stop requests that the supervisor has received."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stops:
    """The stop requests so far. Handlers only count; everything else happens in the loop."""

    def __init__(self) -> None:
        self.signal: str | None = None  # the first one's name
        self.interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless `nohup` has it ignored) instead of dying of them."""

        def count(number: int, frame: FrameType | None) -> None:
            self.signal = self.signal or signal.Signals(number).name
            self.interrupts += number == signal.SIGINT

        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, count) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
