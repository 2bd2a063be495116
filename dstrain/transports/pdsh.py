"""`transport: pdsh`: the connections of `ssh`, all in one pdsh that is given the program to start (its module `exec`).

pdsh forwards no standard input, takes a connection that was killed for a success, and mixes all hosts' words. What it
starts for a node therefore reads a named pipe of this machine, and leaves a log and its exit code in files: neither the
truth nor the secrets in the node's script depend on pdsh. The pipes' folder is the user's alone.
"""

import contextlib
import os
import shlex
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.environment import for_child
from dstrain.base.processes import ATTEMPT_MARK
from dstrain.errors import UserError
from dstrain.transport.channel import SIGNS_OF_LIFE, Channel, end_marker
from dstrain.transport.command import Cluster
from dstrain.transport.launchers import Launcher, LauncherEnd, launcher_log
from dstrain.transport.profile import Profile
from dstrain.transports.ssh import OverSsh, remote_command, ssh_command, what_pdsh_lacks

LINES = "DSTRAIN_LINES"  # environment variable of pdsh: a folder with a named pipe for each node
_PDSHS_OWN = ("PDSH_", "DSHPATH", "FANOUT", "WCOLL")  # variables that would change what it does
# What pdsh starts here for node %n of the hosts in "$@".
_FAN_OUT = """\
shift %n
{ssh} "$1" {entry} <"${lines}/%n" >>"${lines}/%n.log" 2>&1
code=$?
echo "$code" >"${lines}/%n.code"
exit "$code"
"""


class Pdsh(OverSsh):
    """pdsh, and the connections in it."""

    def starter(self, profile: Profile) -> str:
        """This one. Raises UserError: it is not here, or cannot start other programs than its own."""
        if (missing := what_pdsh_lacks()) is not None:
            raise UserError(f"transport: pdsh: {missing}, or write `transport: ssh`")
        return profile.transport

    def channels(self, cluster: Cluster) -> tuple[Channel, ...]:
        """All connections in one process."""
        return pdsh_channel(cluster.hosts, cluster.lost_after_seconds)


TRANSPORT = Pdsh()


def pdsh_channel(hosts: Sequence[str], lost_after_seconds: int) -> tuple[Channel, ...]:
    """The connections to the hosts, in one process."""
    # pdsh replaces %n with the node's number, and %% with %
    entry = shlex.quote(remote_command(0).replace("%", "%%").replace("dstrain-node 0", "dstrain-node %n"))
    script = _FAN_OUT.format(ssh=shlex.join(ssh_command(lost_after_seconds)), entry=entry, lines=LINES)
    pdsh = ("pdsh", "-S", "-R", "exec", "-f", str(len(hosts)), "-w", ",".join(hosts))
    arguments = (*pdsh, "sh", "-c", script, "dstrain-pdsh", *hosts)
    return (PipedChannel(tuple(range(len(hosts))), arguments, OverSsh.lost_codes),)


@dataclass(frozen=True)
class PipedChannel(Channel):
    """Its standard input is a named pipe for each node (see LINES)."""

    def as_shell(self, script: str) -> str:
        """See `Channel`."""
        end = end_marker(script)
        pipes = " ".join(f'"${LINES}/{node}"' for node in self.nodes)
        lines = [f'export {LINES}="$(mktemp -d)"  # where each node\'s log and exit code will be', f"mkfifo {pipes}"]
        lines.append(f"{SIGNS_OF_LIFE} <<'{end}' | tee {pipes} >/dev/null &")
        return "\n".join([*lines, f"{script}{end}", shlex.join(self.arguments)])

    def start(self, hosts: Mapping[int, str], attempt_folder: Path, script: str) -> Launcher:
        """See `Channel`."""
        return FanOut(hosts, self.arguments, attempt_folder, script, self.lost_codes)


class FanOut(Launcher):
    """pdsh, and the lines through it: each node has a line of control, an exit code and a log of its own."""

    def __init__(
        self,
        hosts: Mapping[int, str],
        arguments: Sequence[str],
        attempt_folder: Path,
        script: str,
        lost_codes: frozenset[int] = OverSsh.lost_codes,
    ) -> None:
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
        environment = for_child(added, without=_PDSHS_OWN)
        super().__init__(hosts, arguments, environment, attempt_folder / "logs" / "pdsh.log", lost_codes=lost_codes)
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
        killed = self.process.poll() or -signal.SIGKILL
        ends = []
        for node, host in self.hosts.items():
            code = self._exit_code(node)
            code = killed if code is None else code
            ends.append(LauncherEnd({node: host}, code, is_lost=code in self.lost_codes))
        return ends

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
