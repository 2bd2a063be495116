"""What a run is, and the command of an attempt on this machine, so that `--dry-run` shows exactly what would run."""

import shlex
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dstrain.base.environment import recordable
from dstrain.base.processes import ATTEMPT_MARK
from dstrain.base.section import Section
from dstrain.rundir.run_folder import TRAINING, attempt_folder
from dstrain.transport.node_script import LOST_AFTER_SECONDS, NodeSettings

_FIRST_PORT, _PORTS = 20_000, 12_000  # below Linux's ephemeral ports


@dataclass(frozen=True)
class Cluster:
    """Where a run with a launch profile takes place."""

    transport: str  # a name of `dstrain.transport.transport.TRANSPORTS`
    hosts: tuple[str, ...]  # the nodes, in the order of their numbers
    settings: NodeSettings
    rendezvous_port: int | None = None  # None: another one for each attempt
    code: str | None = None  # digest of the source that has to run there
    section: Section | None = None  # the profile's, for what the transport alone needs
    lost_after_seconds: int = LOST_AFTER_SECONDS  # how long a host may be silent, where connections can be lost


@dataclass(frozen=True)
class Job:
    """One run, as the user asked for it."""

    name: str
    run_dir: Path
    ranks: int  # of each node
    max_restarts: int = 3
    shutdown_timeout_seconds: int = 600  # from SIGTERM to SIGKILL: a step, and a checkpoint to a slow disk
    entry: str = TRAINING  # what each rank calls
    cluster: Cluster | None = None  # None: this machine, in the environment of the command
    ends_unix: float | None = None  # when the scheduler ends it
    node_range: tuple[int, int] | None = None  # fewest and most that it may go on with when one is lost
    spare_hosts: tuple[str, ...] = ()  # that may then stand in
    on_hang: Literal["restart", "stop"] = "restart"  # what follows when a rank stands still
    scheduler_job: str | None = None  # the job of a queue that the supervisor runs in
    can_be_moved: bool = False  # a lost node ends it with 75: whoever started it starts it again on others

    def without(self, host: str) -> "Job | None":
        """The same on the nodes that are left, and on spare ones; None if there are too few, or it is on none."""
        if self.cluster is None or host not in self.cluster.hosts:
            return None
        left = (*(one for one in self.cluster.hosts if one != host), *self.spare_hosts)
        fewest, most = self.node_range or (0, 0)
        most = min(most, len(left))
        if most < max(fewest, 1):
            return None
        return replace(self, cluster=replace(self.cluster, hosts=left[:most]), spare_hosts=left[most:])

    @property
    def world(self) -> int:
        """All ranks."""
        return self.ranks * (1 if self.cluster is None else len(self.cluster.hosts))


@dataclass(frozen=True)
class Command:
    """What is started: arguments, and what is added to the environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def as_shell(self) -> str:
        """The same as lines for a POSIX shell."""
        exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return "\n".join([*exports, shlex.join(self.arguments)])


def command(job: Job, attempt: int, python: str, cores: int, port: int, supervisor_pid: int | None) -> Command:
    """How one attempt is started: a single rank directly, several through the elastic agent.

    Args:
        job: the run.
        attempt: its number, from 1.
        python: the interpreter for agent and ranks.
        cores: CPU cores of this machine, shared out among the ranks.
        port: a free one, for the process group of a single rank (an agent finds its own).
        supervisor_pid: the process whose death ends everything; None leaves that out.
    """
    environment = {
        ATTEMPT_MARK: str(attempt_folder(job.run_dir, attempt).resolve()),
        "OMP_NUM_THREADS": str(max(1, cores // job.ranks)),
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are here: neither the host's name nor its network matters
    }
    arguments = ["--run-dir", str(job.run_dir), "--attempt", str(attempt), "--entry", job.entry]
    if supervisor_pid is not None:
        arguments += ["--parent-pid", str(supervisor_pid)]
    if job.ranks == 1:
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return Command((python, "-u", "-m", "dstrain.rank", *arguments), environment)
    arguments += ["--ranks", str(job.ranks), "--shutdown-timeout", str(job.shutdown_timeout_seconds)]
    return Command((python, "-u", "-m", "dstrain.agent.agent", *arguments), environment)


def shell_comment(text: str) -> str:
    """The text as comments for a shell, however many lines it has: a folder's name may contain line breaks."""
    return "\n".join(f"# {line}" for line in text.splitlines())


def with_users_choice(command: Command, environment: Mapping[str, str]) -> Command:
    """Leave to the user what they have set themselves (threads, network device)."""
    theirs = {name for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME") if name in environment}
    return Command(command.arguments, {k: v for k, v in command.environment.items() if k not in theirs})


def record(command: Command, environment: Mapping[str, str], folder: str) -> dict[str, Any]:
    """What `command.json` holds: enough to start the same attempt by hand, beside what only the user's shell knows."""
    kept = recordable({**environment, **command.environment})
    return {"argv": list(command.arguments), "cwd": folder, "environment": kept}


def rendezvous(job: Job, cluster: Cluster, number: int) -> tuple[str, int]:
    """Host and port where the ranks of an attempt on several nodes meet."""
    first = cluster.hosts[0].rpartition("@")[2]  # user@host is for ssh alone
    return first, cluster.rendezvous_port or rendezvous_port(job.run_dir, number)


def rendezvous_port(run_dir: Path, attempt: int) -> int:
    """A port that changes with the attempt, so that one in use costs one restart and not the run."""
    return _FIRST_PORT + zlib.crc32(f"{run_dir}\0{attempt}".encode()) % _PORTS
