"""One plan, three transports: how the agents of an attempt are started from the supervisor's machine. Pure.

    local    bash                       on this machine
    ssh      ssh HOST bash, in parallel from the machine where the user typed; started by pdsh where that is installed
    slurm    srun bash                  inside the allocation, from its first node

All of them start the same words (`entry_command`), which read the same script (`node_script`).
"""

import shlex
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.transport.node_script import entry_command

SSH = (
    *("ssh", "-T", "-a", "-x"),
    *("-o", "BatchMode=yes"),  # never asks for a password
    *("-o", "StrictHostKeyChecking=yes"),  # an unknown or changed host key is refused
    *("-o", "ConnectTimeout=15"),
)
_SIGNS_OF_LIFE = 6  # that a host may miss
LINES = "DSTRAIN_LINES"  # environment variable of pdsh: a folder with a named pipe for each node
# What pdsh starts here for node %n of the hosts in "$@". pdsh has three weaknesses: it forwards no standard input,
# takes a connection that was killed for a success, and mixes all hosts' words. So each node gets a pipe, a file for the
# exit code, and a log.
_FAN_OUT = """\
shift %n
{ssh} "$1" {entry} <"${lines}/%n" >>"${lines}/%n.log" 2>&1
code=$?
echo "$code" >"${lines}/%n.code"
exit "$code"
"""
_FIRST_PORT, _PORTS = 20_000, 12_000  # below Linux's ephemeral ports


@dataclass(frozen=True)
class Channel:
    """A process of the supervisor's machine that starts agents, and passes on its standard input to them."""

    nodes: tuple[int, ...]  # their numbers
    arguments: tuple[str, ...]
    has_pipes: bool = False  # its standard input is a named pipe for each node (see LINES) instead

    def as_shell(self, script: str) -> str:
        """The same as lines for a POSIX shell: the script, and then the supervisor's signs of life."""
        end = "END OF NODE SCRIPT"
        while end in script.splitlines():
            end += "."
        alive = "{ cat; while sleep 5 && echo; do :; done; }"
        if not self.has_pipes:
            return f"{alive} <<'{end}' | {shlex.join(self.arguments)}\n{script}{end}"
        pipes = " ".join(f'"${LINES}/{node}"' for node in self.nodes)
        lines = [f'export {LINES}="$(mktemp -d)"  # where each node\'s log and exit code will be', f"mkfifo {pipes}"]
        lines += [f"{alive} <<'{end}' | tee {pipes} >/dev/null &", f"{script}{end}", shlex.join(self.arguments)]
        return "\n".join(lines)


def local_channels() -> tuple[Channel, ...]:
    """A single node: this one."""
    return (Channel((0,), entry_command(0)),)


def ssh_channels(hosts: Sequence[str], lost_after_seconds: int) -> tuple[Channel, ...]:
    """A connection for each host. The remote shell gets one word list, quoted for it, without anything secret.

    A host that gives no sign of life for `lost_after_seconds` is lost: its connection ends with 255.
    """
    ssh = _ssh(lost_after_seconds)
    return tuple(Channel((node,), (*ssh, host, _remote(node))) for node, host in enumerate(hosts))


def pdsh_channel(hosts: Sequence[str], lost_after_seconds: int) -> tuple[Channel, ...]:
    """The same connections, started by a pdsh that is given the program to start (its module `exec`)."""
    # pdsh replaces %n with the node's number, and %% with %
    entry = shlex.quote(_remote(0).replace("%", "%%").replace("dstrain-node 0", "dstrain-node %n"))
    script = _FAN_OUT.format(ssh=shlex.join(_ssh(lost_after_seconds)), entry=entry, lines=LINES)
    pdsh = ("pdsh", "-S", "-R", "exec", "-f", str(len(hosts)), "-w", ",".join(hosts))
    return (Channel(tuple(range(len(hosts))), (*pdsh, "sh", "-c", script, "dstrain-pdsh", *hosts), has_pipes=True),)


def _remote(node: int) -> str:
    """What the remote shell gets. It stays, and tells of an agent that was killed: ssh would call that a lost link."""
    return f"{shlex.join(entry_command(node))}; exit"


def _ssh(lost_after_seconds: int) -> tuple[str, ...]:
    alive = ("-o", f"ServerAliveInterval={lost_after_seconds // _SIGNS_OF_LIFE}")
    return (*SSH, *alive, "-o", f"ServerAliveCountMax={_SIGNS_OF_LIFE}", "--")


def slurm_channels(hosts: Sequence[str], cpus_per_task: int | None) -> tuple[Channel, ...]:
    """One job step over all hosts, which get the numbers that they have in `hosts`."""
    count = str(len(hosts))
    srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}"]
    srun += ["--distribution=block", "--export=ALL", "--mpi=none", "--cpu-bind=none", "--label"]
    # The supervisor decides when the others are ended: each is to say first what happened to it.
    srun += ["--kill-on-bad-exit=0", "--wait=0"]
    if cpus_per_task is not None:
        srun.append(f"--cpus-per-task={cpus_per_task}")  # srun does not take it from the job since SLURM 22.05
    return (Channel(tuple(range(len(hosts))), (*srun, *entry_command(None))),)


def rendezvous_port(run_dir: Path, attempt: int) -> int:
    """A port that changes with the attempt, so that one in use costs one restart and not the run."""
    return _FIRST_PORT + zlib.crc32(f"{run_dir}\0{attempt}".encode()) % _PORTS
