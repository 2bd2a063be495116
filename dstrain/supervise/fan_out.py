"""All connections of an attempt in one pdsh, yet each node with a line of control, an exit code and a log of its own.

pdsh forwards no standard input, and takes a connection that was killed for a success. What it starts for a node (see
`transport.pdsh_channel`) therefore reads a named pipe of this machine, and leaves its exit code in a file beside it:
neither the truth nor the secrets in the node's script depend on pdsh. The pipes' folder is the user's alone.
"""

import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.base.environment import for_child
from dstrain.base.processes import ATTEMPT_MARK
from dstrain.diagnose.evidence import LauncherEnd, launcher_log
from dstrain.supervise.launchers import Launcher
from dstrain.transport.transport import LINES

_PDSHS_OWN = ("PDSH_", "DSHPATH", "FANOUT", "WCOLL")  # variables that would change what it does


class FanOut(Launcher):
    """pdsh, and the lines through it."""

    def __init__(self, hosts: Mapping[int, str], arguments: Sequence[str], attempt_folder: Path, script: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dstrain-lines-")  # gone with this object
        folder = Path(self._folder.name)
        self._pipes: list[int] = []
        for node, host in hosts.items():
            log = launcher_log(attempt_folder, host)
            log.parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{node}.log").symlink_to(log.absolute())
            os.mkfifo(folder / f"{node}", 0o600)
            # for reading as well, so that neither opening nor writing waits for the other side
            self._pipes.append(os.open(folder / f"{node}", os.O_RDWR))
        # the mark: should pdsh have to be killed, what it has started is found
        added = {LINES: str(folder), ATTEMPT_MARK: str(attempt_folder.resolve())}
        super().__init__(hosts, arguments, for_child(added, without=_PDSHS_OWN), attempt_folder / "logs" / "pdsh.log")
        self.is_controlled = True
        self._write(script.encode())
        for pipe in self._pipes:
            os.set_blocking(pipe, False)  # a lost link must not hold up the supervisor

    @property
    def has_failed(self) -> bool:
        """Whether one of the connections, or pdsh, has ended badly."""
        return super().has_failed or any(self._exit_code(node) for node in self.hosts)

    def ends(self) -> list[LauncherEnd]:
        """How each node's connection ended; one that left no exit code was killed, whatever pdsh says."""
        codes = {node: self._exit_code(node) for node in self.hosts}
        killed = self.process.poll() or -signal.SIGKILL
        return [LauncherEnd({node: self.hosts[node]}, killed if code is None else code) for node, code in codes.items()]

    def hang_up(self) -> None:
        """Have agents kill everything at once."""
        while self._pipes:
            os.close(self._pipes.pop())

    def _exit_code(self, node: int) -> int | None:
        with contextlib.suppress(OSError, ValueError):  # not yet, or being written
            return int((Path(self._folder.name) / f"{node}.code").read_text())
        return None

    def _write(self, data: bytes) -> None:
        for pipe in self._pipes:
            rest = data
            with contextlib.suppress(OSError):  # full: it does not read at the moment
                while rest:
                    rest = rest[os.write(pipe, rest) :]
