"""A SLURM cluster on one machine: a controller `ctl` and nodes `node1` …, each a host of its own, on loopback.

Clients (sbatch, srun, squeue …) run anywhere on the machine with `SLURM_CONF` set, as they would on a login node.
Partitions: `main` (default; its jobs are preempted and requeued) and `high` (preempts). Read docs/lab.md for the traps.
"""

import hashlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path

from lab_host import Host, LabError, cannot_host, changing, check_folder, read_mark, run_command, wait_for, write_mark

KIND = "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "unshare", "nsenter", "setsid", "timeout")
GPUS_PER_NODE = 2  # pretended ones: --gres=gpu:N sets CUDA_VISIBLE_DEVICES
READY_SECONDS = 60.0
CONTROLLER = 100  # last number of ctl's address
SERVING = frozenset({"idle", "mixed", "allocated", "completing"})  # states of a node that takes jobs

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=ctl(127.77.{network}.{controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# cred_expire (default 120 s) is also how long a requeued job must wait before it starts again
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/ctl/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
# no cgroups: jobs are told apart by their place in the process table
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
# a node that comes back serves again by itself; nodes have the processors that are written here, not those there are
ReturnToService=2
SlurmdParameters=config_overrides
# quick, so that a rehearsal is
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=30
TCPTimeout=10
BatchStartTimeout=60
EpilogMsgTime=1
MinJobAge=3600
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# requeue: after a node's death, preemption, `scontrol requeue`. Preemption first sends the job's --signal, then waits
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=30
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=1:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName=node{number} NodeAddr=127.77.{network}.{number} Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
)


def render_slurm_conf(folder: Path, *, nodes: int, network: int, port: int) -> str:
    """slurm.conf of a lab whose controller listens on `port` and whose node number i listens on `port + i`."""
    # every slurmd has a port of its own: they share the loopback, and srun inside of a job must be reachable from all
    lines = [
        NODE.format(number=number, network=network, port=port + number, gpus=GPUS_PER_NODE)
        for number in range(1, nodes + 1)
    ]
    return SLURM_CONF.format(folder=folder, network=network, controller=CONTROLLER, port=port, nodes="\n".join(lines))


class SlurmLab:
    """The SLURM cluster whose state lies in `folder`. Nothing runs before `up`, and nothing is left after `down`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @staticmethod
    def cannot_run() -> str | None:
        """Why this machine cannot run a SLURM lab, in one line; None if it can."""
        return cannot_host(PROGRAMS, network=False)

    @property
    def env(self) -> dict[str, str]:
        """What the environment of sbatch, srun, squeue … needs beside the usual."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self, nodes: int = 3) -> None:
        """Start what does not run yet: a new lab of `nodes` nodes, or an older one's hosts that are powered off."""
        with changing(self.folder):
            if read_mark(self.folder, KIND) is None:
                check_folder(self.folder)
                self._create(nodes)
            self._boot(list(self._hosts()))
            self._wait_until_nodes(list(self._hosts())[1:], SERVING)

    def down(self) -> None:
        """End every process of the lab, its jobs' included, and delete its folder."""
        with changing(self.folder):
            if read_mark(self.folder, KIND) is not None:
                for host in self._hosts().values():
                    host.power_off()
                shutil.rmtree(self.folder)
            elif self.folder.exists():
                self.folder.rmdir()

    def status(self) -> dict[str, bool]:
        """Of every host, whether it is powered on. Empty without a lab."""
        if read_mark(self.folder, KIND) is None:
            return {}
        return {name: host.init is not None for name, host in self._hosts().items()}

    def run(self, *argv: str, timeout_seconds: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a client, as `lab.run("squeue", "--noheader")`, on this machine."""
        return run_command(argv, timeout_seconds, {**os.environ, **self.env}, check=check)

    def on(
        self, name: str, argv: Sequence[str], timeout_seconds: float = 60, *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on one host, as someone would who is logged in there, in the current folder."""
        return run_command(self.entering(name, argv), timeout_seconds, {**os.environ, **self.env}, check=check)

    def entering(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on a host, for those who start and watch it themselves."""
        return self._host(name).entering(argv, Path.cwd())

    def kill_node(self, name: str) -> None:
        """Power a host off: the daemon and every process of a job on it end at once. SLURM is not told."""
        with changing(self.folder):
            self._host(name).power_off()

    def revive_node(self, name: str) -> None:
        """Power a host on again and wait until SLURM gives it jobs."""
        with changing(self.folder):
            self._boot([self._host(name).name])
            self._wait_until_nodes([name] if name != "ctl" else [], SERVING)

    def reset(self) -> None:
        """Back to the start: no jobs, nor what jobs left running; every host powered on, every node idle."""
        nodes = list(self._hosts())[1:]
        with changing(self.folder):
            self._boot(["ctl", *nodes])
            self.run("scancel", "--user=root", "--state=PENDING")
            # no patience for scripts that trap TERM, nor for what they started beside SLURM
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            for name in nodes:
                self._host(name).kill_processes(with_variable="SLURM_JOB_ID")
            self.run("scancel", "--user=root")
            for name in self._states({"drained", "draining"}):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
            self._wait_until_nodes(nodes, {"idle"})

    def _settings(self) -> dict[str, int]:
        settings = read_mark(self.folder, KIND)
        if settings is None:
            raise LabError(f"there is no lab in {self.folder}; start one with `up`")
        return settings

    def _hosts(self) -> dict[str, Host]:
        settings = self._settings()
        numbers = {"ctl": CONTROLLER} | {f"node{number}": number for number in range(1, settings["nodes"] + 1)}
        return {
            name: Host(name, f"127.77.{settings['network']}.{number}", self.folder / name)
            for name, number in numbers.items()
        }

    def _host(self, name: str) -> Host:
        hosts = self._hosts()
        if name not in hosts:
            raise LabError(f"no host {name!r}; there are {', '.join(hosts)}")
        return hosts[name]

    def _create(self, nodes: int) -> None:
        network, port = free_addresses(self.folder, nodes)
        write_mark(self.folder, KIND, {"nodes": nodes, "network": network, "port": port})
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        conf = render_slurm_conf(self.folder, nodes=nodes, network=network, port=port)
        (self.folder / "slurm.conf").write_text(conf)
        # read by every slurmd; v1 is the one that does nothing until it is asked to
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(GPUS_PER_NODE):
            os.mknod(
                self.folder / f"nvidia{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3)
            )  # /dev/null by another name
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/nvidia[0-{GPUS_PER_NODE - 1}]\n")

    def _boot(self, names: Sequence[str]) -> None:
        hosts = self._hosts()
        # the machine's own names stay known; the lab's come first
        own = "".join(f"{host.address} {host.name}\n" for host in hosts.values())
        hosts_file = own + Path("/etc/hosts").read_text()
        for host in (hosts[name] for name in names):
            if host.init is None:
                (host.folder / "spool").mkdir(parents=True, exist_ok=True)
                host.boot(hosts_file, self._services(host.name))
        # SLURM goes on calling a node idle for a while that was dead and is not yet back
        for name in names:
            if not wait_for(partial(self._listens, name), READY_SECONDS):
                raise LabError(f"the daemon of {name} does not listen after {READY_SECONDS:.0f} s:\n{self._logs()}")

    def _listens(self, name: str) -> bool:
        number = 0 if name == "ctl" else int(name.removeprefix("node"))
        with socket.socket() as probe:
            return probe.connect_ex((self._host(name).address, self._settings()["port"] + number)) == 0

    def _services(self, name: str) -> list[list[str]]:
        conf = self.folder / "slurm.conf"
        if name != "ctl":
            return [["slurmd", "-D", "-N", name, "-f", str(conf)]]
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "seed", "pid")]
        # --force: it may run as root, with a socket in a folder of its own
        munged = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files]
        return [munged, ["slurmctld", "-D", "-f", str(conf)]]

    def _states(self, wanted: Set[str]) -> list[str]:
        """Names of the nodes whose state, as SLURM sees it, is among those wanted."""
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False).stdout
        return [name for name, state in map(str.split, listed.splitlines()) if state in wanted]

    def _wait_until_nodes(self, names: Sequence[str], wanted: Set[str]) -> None:
        if not wait_for(lambda: set(names) <= set(self._states(wanted)), READY_SECONDS):
            waited = f"{', '.join(names)} not {' or '.join(sorted(wanted))} after {READY_SECONDS:.0f} s"
            raise LabError(f"{waited}:\n{self.run('sinfo', '--Node', '--long', check=False).stdout}\n{self._logs()}")

    def _logs(self) -> str:
        """The ends of all daemons' logs."""
        logs = sorted(self.folder.glob("*/*.log"))
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


def free_addresses(folder: Path, nodes: int) -> tuple[int, int]:
    """A network number (127.77.N.*) and first port that no other lab uses; the folder says where to begin looking."""
    first = int.from_bytes(hashlib.blake2b(str(folder).encode(), digest_size=2).digest())
    for step in range(200):
        network = 1 + (first + step) % 200
        port = 10000 + 40 * network  # below those that runs take; a lab has at most 39 nodes
        if all(_is_free(port + number) for number in range(nodes + 1)):
            return network, port
    raise LabError("no free ports between 10000 and 18000; end other labs with `down`")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
