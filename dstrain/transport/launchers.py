"""The processes that an attempt starts on this machine: a rank, an agent, or the way to agents elsewhere."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.processes import ends_within, start
from dstrain.transport.control import STOP, beat

HANG_UP_SECONDS = 20.0  # for agents to kill their ranks, and for the way to them to close


@dataclass(frozen=True)
class LauncherEnd:
    """How a process ended that the supervisor started: a rank, an agent, or the way to agents elsewhere."""

    hosts: Mapping[int, str]  # nodes that it stands for, by their numbers
    exit_code: int  # negative for a signal
    is_rank: bool = False  # rank 0 itself, without an agent
    is_lost: bool = False  # the node, or the way to it, was lost: the agent may still be at work there


def launcher_log(attempt_folder: Path, host: str) -> Path:
    """What the started process prints itself (the agent, or a rank before it opens its own log)."""
    return attempt_folder / "logs" / host / "launcher.log"


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
        lost_codes: frozenset[int] = frozenset(),
    ) -> None:
        self.hosts, self.is_rank, self.is_controlled = hosts, is_rank, script is not None
        self.lost_codes = lost_codes
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = start(
                arguments,
                environment=environment,
                stdin="nothing" if script is None else "pipe",
                output=output,
                own_session=True,  # Ctrl-C in the terminal is for the supervisor alone
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
        code = -signal.SIGKILL if code is None else code
        return [LauncherEnd(self.hosts, code, self.is_rank, code in self.lost_codes)]

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
            if ends_within(launcher.process, deadline - time.monotonic()):
                continue
            launcher.process.kill()
            launcher.process.wait()
