"""The processes that an attempt starts on this machine: a rank, an agent, or the way to agents elsewhere."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.diagnose.evidence import LauncherEnd
from dstrain.transport.control import STOP, beat

HANG_UP_SECONDS = 20.0  # for agents to kill their ranks, and for the way to them to close


class Launcher:
    """One of them. With a `script` it is led through its standard input, else by signals."""

    def __init__(
        self,
        hosts: Mapping[int, str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        script: str | None = None,
        is_rank: bool = False,
    ) -> None:
        self.hosts, self.is_rank, self.is_controlled = hosts, is_rank, script is not None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                arguments,
                env=environment,
                stdin=subprocess.DEVNULL if script is None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            )
        if script is not None:
            self._write(script.encode())
            assert self.process.stdin is not None
            os.set_blocking(self.process.stdin.fileno(), False)  # a lost link must not hold up the supervisor

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def beat(self) -> None:
        """Tell agents that their supervisor lives."""
        if self.is_controlled:
            self._write(beat())

    def stop(self) -> None:
        """Ask the ranks to save and leave."""
        if self.is_controlled:
            self._write(STOP)
        else:
            self.process.terminate()

    def hang_up(self) -> None:
        """Have agents kill everything at once."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    @property
    def has_failed(self) -> bool:
        """Whether it, or a part of it, has ended badly already."""
        return bool(self.process.poll())

    def ends(self) -> list[LauncherEnd]:
        """How it ended; as killed if it hangs in the kernel."""
        code = self.process.poll()
        return [LauncherEnd(self.hosts, -signal.SIGKILL if code is None else code, self.is_rank)]

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, or does not read at the moment
            self.process.stdin.write(data)
            self.process.stdin.flush()


def end_all(launchers: Sequence[Launcher]) -> None:
    """Hang up, wait a little for what is on other machines, and kill what is left here."""
    for launcher in launchers:
        launcher.hang_up()
    deadline = time.monotonic() + HANG_UP_SECONDS
    for launcher in launchers:
        if launcher.is_controlled:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.process.wait(max(0.0, deadline - time.monotonic()))
                continue
            launcher.process.kill()
            launcher.process.wait()
