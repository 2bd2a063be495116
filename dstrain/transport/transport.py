"""What a transport is: how the agents of an attempt come to the nodes of a run. One file each in `dstrain.transports`.

    local    bash                       on this machine
    ssh      ssh HOST bash, in parallel from the machine where the user typed
    pdsh     the same connections, started by pdsh
    slurm    srun bash                  inside the allocation, from its first node, where a batch job supervises

All of them start the same words (`node_script.entry_command`), which read the same script (`node_script.node_script`).
A transport that hands runs over to a scheduler has a `Queue` as well.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dstrain.base.registry import Registry
from dstrain.base.section import Section
from dstrain.errors import UserError
from dstrain.recipe.source import Node, Problem
from dstrain.transport.channel import Channel
from dstrain.transport.command import Cluster
from dstrain.transport.hostfile import Host

if TYPE_CHECKING:
    from dstrain.transport.profile import Profile
    from dstrain.transport.submission import Submission, WorkerArray

Objection = tuple[Literal["warning", "error"], str, str]  # level, what is wrong, what to do


class Transport(ABC):
    """One way to nodes. What is not abstract has a default that fits a transport without a scheduler."""

    section_name: ClassVar[str | None] = None  # the profile's key for what this transport alone needs
    section: ClassVar[type[Section]] = Section  # its keys
    section_example: ClassVar[str | None] = None  # how it is written; None: it may be left out
    most_nodes: ClassVar[int | None] = None  # of a run; None: as many as there are
    is_this_terminal: ClassVar[bool] = False  # its node is the supervisor's: a debug run has its terminal
    loses_connections: ClassVar[bool] = False  # an agent may go on while the way to it is lost
    lost_codes: ClassVar[frozenset[int]] = frozenset()  # exit codes of a channel by which that is told
    queue: ClassVar["Queue | None"] = None  # None: `dstrain run` supervises from where it was typed

    @abstractmethod
    def hosts(self, profile: "Profile") -> Sequence[Host]:
        """The nodes that there are, in the order of their numbers. Of a queue: those that the present job has.

        Raises:
            UserError: they cannot be told.
        """

    @abstractmethod
    def channels(self, cluster: Cluster) -> tuple[Channel, ...]:
        """What is started on the supervisor's machine, so that each host of the cluster has an agent. Pure."""

    def probes(self, cluster: Cluster) -> tuple[Channel, ...]:
        """The same for a program whose standard output is read back from each channel, as the preflight's."""
        return self.channels(cluster)

    def hosts_place(self, profile: "Profile") -> str:
        """Where the hosts are listed, for messages."""
        return "the transport"

    def ranks_of_node(self) -> int | None:
        """How many ranks a node has where neither the profile nor its host says so; None: the user has to."""
        return None

    def starter(self, profile: "Profile") -> str:
        """The name of the transport that starts the agents, where this one leaves it to another.

        Raises:
            UserError: what the profile wants is not on this machine.
        """
        return profile.transport

    def reach_remedy(self, host: str) -> str:
        """What to try when a host cannot be reached."""
        return f"look whether {host} is up"

    def section_problems(self, section: Node) -> Iterator[Problem]:
        """Rules of the section's values beyond their types, each with its place."""
        yield from ()

    def time_limit_seconds(self, profile: "Profile") -> int | None:
        """After how long whatever runs there is ended; None: never."""
        return None

    def objections(
        self, profile: "Profile", needed_seconds: float, source: str, kill_wait_seconds: int | None
    ) -> Iterator[Objection]:
        """What the profile promises and this transport cannot keep. Pure.

        Args:
            profile: what the user wrote.
            needed_seconds: of a step and a save.
            source: how that is known, as words: "took", "will take about".
            kill_wait_seconds: from the scheduler's word to stop to its killing, where that is known.
        """
        yield from ()


class JobState(Enum):
    """Of a job that a queue still knows."""

    PENDING = "has never begun: cancelled, it leaves nothing"
    REQUEUED = "has begun before, and waits to begin again"
    RUNNING = "runs, or ends"


class Queue(ABC):
    """A scheduler that a run is handed over to: `dstrain.supervise.batch` then runs inside of a job."""

    script_name: ClassVar[str]  # of the batch script in the run's folder
    log_name: ClassVar[str]  # of what the job prints there
    poll_seconds: ClassVar[float] = 2.0  # how often it may be asked for a job's state

    # ------------------------------------------------------------ from anywhere

    @abstractmethod
    def script(self, submission: "Submission", lead_seconds: float) -> str:
        """The batch script. Pure.

        Args:
            submission: the run.
            lead_seconds: how long before the job's end the supervisor asks the run to stop, as far as is known now.
        """

    def array_script(self, array: "WorkerArray") -> str:
        """The batch script of many workers on a node each. Pure. Raises UserError: there are no arrays of jobs."""
        remedy = "run `dstrain sweep --worker` in jobs of your own"
        raise UserError(f"transport: {array.profile.transport} has no arrays of jobs; {remedy}")

    @abstractmethod
    def requeues(self, submission: "Submission") -> bool:
        """Whether a job puts itself back into the queue once a checkpoint is committed."""

    @abstractmethod
    def is_reachable(self) -> bool:
        """Whether jobs can be asked for from this machine."""

    @abstractmethod
    def submit(self, script: Path) -> str:
        """Hand over a batch script; the job's name for the other methods. Raises UserError: it is refused."""

    @abstractmethod
    def state(self, job: str) -> JobState | None:
        """None: nothing is known of such a job any more. Raises UserError: the queue does not answer."""

    @abstractmethod
    def cancel(self, job: str) -> None:
        """End a job that has not begun."""

    @abstractmethod
    def ask_to_stop(self, job: str) -> None:
        """SIGTERM for the job's supervisor: it saves, and does not requeue the job."""

    @abstractmethod
    def requeue(self, job: str) -> None:
        """Put the job that runs back into the queue."""

    def kill_wait_seconds(self) -> int | None:
        """How long after SIGTERM the scheduler kills a job; None where it does not say."""
        return None

    def run_inside(self, profile: "Profile", nodes: tuple[int, int], minutes: int, command: Sequence[str]) -> int:
        """Run a command on nodes that the queue grants now, as `current_job` sees it; its exit code.

        Raises:
            UserError: no nodes are granted, or only to jobs that are submitted.
        """
        raise UserError(
            f"transport: {profile.transport} grants nodes to submitted jobs only; run this command inside of one"
        )

    # ------------------------------------------------------------ inside a job

    @abstractmethod
    def current_job(self) -> str | None:
        """The job that this process runs in."""

    def seconds_left(self, job: str) -> float | None:
        """How long the job may still run; None without a limit."""
        return None


TRANSPORTS: Registry[Transport] = Registry("transport", Transport, "dstrain.transports")


def queue_names() -> list[str]:
    """The transports that hand runs over to a queue; those that cannot be imported are left out."""
    names = []
    for name in TRANSPORTS:
        try:
            transport = TRANSPORTS[name]
        except UserError:
            continue
        if transport.queue is not None:
            names.append(name)
    return names
