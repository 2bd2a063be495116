"""What the facts of the nodes mean for a run: a list of checks, each with what is wrong and what to do. Pure.

An error would end the run, or make its result worthless; a warning may cost time. docs/operations.md explains each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from dstrain.preflight.ask import Answer
from dstrain.preflight.probe import Facts
from dstrain.transport.transport import TRANSPORTS

CLOCK_TOLERANCE_SECONDS = 5.0  # verdicts compare times of different hosts
SHM_NEEDED_BYTES, SHM_WANTED_BYTES = 8 << 20, 64 << 20  # for each rank: NCCL's buffers between the GPUs of a node
FILES_NEEDED, FILES_WANTED = 256, 1024  # open at once: shards, sockets to the other ranks, libraries
PROCESSES_NEEDED, PROCESSES_WANTED = 32, 256  # for each rank: threads count as well
FREE_FILES_NEEDED = 1000
IN_MEMORY = ("tmpfs", "ramfs", "overlay")
_ITSELF = ("127.0.0.1", "127.0.1.1", "::1")  # not all of 127/8: several nodes of one machine may have addresses there

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the result. `host` is None where it is about all of them."""

    check: str
    level: Level
    host: str | None
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        where = "" if self.host is None else f"{self.host}: "
        return f"{where}{self.text}{self.remedy and '; '}{self.remedy}"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return dict(vars(self))


@dataclass(frozen=True)
class Wanted:
    """What the run will need."""

    transport: str = "local"
    python: str = "python"
    nodes: int = 1  # without spare ones
    ranks: int = 1  # of each node
    has_recipe: bool = True
    room_bytes: int = 0  # for the checkpoints that are still to come
    interface: str | None = None
    port_is_fixed: bool = False
    in_container: bool = False  # whose libraries need not be those of this machine


@dataclass(frozen=True)
class Nodes:
    """All answers beside the facts of the machine that asks."""

    answers: Sequence[Answer]
    here: Facts
    wanted: Wanted
    facts: Mapping[str, Facts] = field(init=False)  # of those that answered

    def __post_init__(self) -> None:
        found = {answer.host: answer.facts for answer in self.answers if answer.facts is not None}
        object.__setattr__(self, "facts", found)


@dataclass(frozen=True)
class Check:
    """A rule: what is wrong, or in a few words what was found to be right."""

    name: str
    problems: Callable[[Nodes], Iterator[tuple[Level, str | None, str, str]]]  # level, host, text, remedy
    summary: Callable[[Nodes], str]


def judge(nodes: Nodes) -> list[Finding]:
    """Every problem, and a line for every check that has found none."""
    findings = []
    for check in CHECKS if nodes.facts else CHECKS[:1]:
        found = [Finding(check.name, *problem) for problem in check.problems(nodes)]
        if not found and nodes.facts:
            found = [Finding(check.name, "ok", None, check.summary(nodes))]
        findings += found
    return findings


Problems = Iterator[tuple[Level, str | None, str, str]]


def _answer_problems(nodes: Nodes) -> Problems:
    for answer in nodes.answers:
        if answer.facts is not None:
            continue
        transport = TRANSPORTS[nodes.wanted.transport]
        if transport.lost_codes and (answer.exit_code is None or answer.exit_code in transport.lost_codes):
            words = answer.last_words or f"{nodes.wanted.transport} failed"
            yield "error", answer.host, f"cannot be reached: {words}", transport.reach_remedy(answer.host)
        else:
            remedy = "the profile's folder, modules, venv and container have to be there"
            words = f"{nodes.wanted.python} does not run there: {answer.last_words or 'no answer'}"
            yield "error", answer.host, words, remedy


def _version_problems(nodes: Nodes) -> Problems:
    for host, there in nodes.facts.items():
        if there.code != nodes.here.code:
            words = f"has other code of dstrain ({there.code}, here {nodes.here.code})"
            yield "error", host, words, "install the same version"
        name, reference = "here", nodes.here
        if nodes.wanted.in_container:
            name, reference = next(iter(nodes.facts.items()))
        for package, version in reference.versions.items():
            if there.versions.get(package) != version:
                other = there.versions.get(package) or "none"
                words = f"has {package} {other}, {name} it is {version or 'missing'}"
                yield "error", host, words, "install the same version"


def _clock_problems(nodes: Nodes) -> Problems:
    for answer in nodes.answers:
        if answer.facts is None:
            continue
        early, late = answer.asked_unix - CLOCK_TOLERANCE_SECONDS, answer.answered_unix + CLOCK_TOLERANCE_SECONDS
        if not early <= answer.facts.time_unix <= late:
            off = answer.facts.time_unix - (answer.asked_unix + answer.answered_unix) / 2
            yield "error", answer.host, f"its clock is off by {off:+.0f} s", "have it synchronised"


def _device_problems(nodes: Nodes) -> Problems:
    ranks = nodes.wanted.ranks
    for host, there in nodes.facts.items():
        if there.visible_devices and ranks > there.visible_devices:
            words = f"{ranks} ranks are to share {there.visible_devices} devices"
            yield "error", host, words, f"say --procs-per-node {there.visible_devices}"
    kinds = {host: tuple(sorted(set(there.devices))) for host, there in nodes.facts.items()}
    if len(set(kinds.values())) > 1:
        shown = "; ".join(f"{host} {', '.join(kind) or 'none'}" for host, kind in kinds.items())
        yield "warning", None, f"the nodes have different devices ({shown})", "the slowest sets the pace"


def _path_problems(nodes: Nodes) -> Problems:
    for host, there in nodes.facts.items():
        for path in there.missing:
            words = f"{path} is missing, empty or not readable"
            yield "error", host, words, "the same files have to be there on every host"
        for location, digest in there.corpora.items():
            expected = nodes.here.corpora.get(location)
            if digest.startswith("error: "):
                yield "error", host, f"cannot read {location}: {digest.removeprefix('error: ')}", "repair it there"
            elif expected is not None and digest != expected and not expected.startswith("error: "):
                words = f"{location} is another corpus there (digest {digest[:12]}, here {expected[:12]})"
                yield "error", host, words, "every node has to read the same files"


def _folder_problems(nodes: Nodes) -> Problems:
    for host, there in nodes.facts.items():
        if there.token != nodes.here.token:
            words = "does not see the run's folder as this machine does"
            yield "error", host, words, "it has to be on a shared file system"
        elif there.unwritable is not None:
            words = f"cannot write into the run's folder: {there.unwritable}"
            yield "error", host, words, "correct its owner or mount options, or choose another --run-dir"
    for host, there in list(nodes.facts.items())[:1]:
        if there.file_system in IN_MEMORY:
            words = f"the run's folder is on {there.file_system}, which does not outlive this machine or container"
            yield "warning", host, words, "choose a --run-dir on a disk"


def _room_problems(nodes: Nodes) -> Problems:
    host, there = min(nodes.facts.items(), key=lambda item: item[1].free_bytes)
    if there.free_bytes < nodes.wanted.room_bytes:
        words = f"{_size(there.free_bytes)} are free, the checkpoints to come need {_size(nodes.wanted.room_bytes)}"
        yield "error", host, words, "make room, lower checkpoint.keep_last, or choose another --run-dir"
    if there.free_files is not None and there.free_files < FREE_FILES_NEEDED:
        yield "error", host, f"only {there.free_files} more files fit on its disk (inodes)", "delete some"


def _shm_problems(nodes: Nodes) -> Problems:
    ranks, remedy = nodes.wanted.ranks, "make it larger: `mount -o remount,size=8G /dev/shm`, --shm-size of a container"
    for host, there in nodes.facts.items():
        if there.shm_free_bytes is None:
            yield "warning", host, "there is no /dev/shm", "NCCL needs it between the GPUs of a node"
        elif there.shm_free_bytes < ranks * SHM_NEEDED_BYTES:
            yield "error", host, f"/dev/shm has {_size(there.shm_free_bytes)} left for {ranks} ranks", remedy
        elif there.visible_devices and ranks > 1 and there.shm_free_bytes < ranks * SHM_WANTED_BYTES:
            yield "warning", host, f"/dev/shm has {_size(there.shm_free_bytes)} left for {ranks} ranks", remedy


def _limit_problems(nodes: Nodes) -> Problems:
    ranks = nodes.wanted.ranks
    bounds = {
        "open files": (FILES_NEEDED, FILES_WANTED, "ulimit -n"),
        "processes": (ranks * PROCESSES_NEEDED, ranks * PROCESSES_WANTED, "ulimit -u"),
    }
    for host, there in nodes.facts.items():
        for name, (needed, wanted, command) in bounds.items():
            limit = there.limits[name]
            if limit is not None and limit < wanted:
                level: Level = "error" if limit < needed else "warning"
                words = f"may have only {limit} {name} ({command}); {wanted} are wanted"
                yield level, host, words, "raise it in /etc/security/limits.conf, or for SLURM with its daemon's limits"
        if there.has_infiniband and there.limits["locked memory"] is not None:
            words = f"may lock only {_size(there.limits['locked memory'])} of memory (ulimit -l), and has InfiniBand"
            yield "warning", host, words, "RDMA wants `unlimited`"


def _network_problems(nodes: Nodes) -> Problems:
    if nodes.wanted.nodes == 1:
        return
    first = nodes.answers[0].host.rpartition("@")[2]
    for host, there in nodes.facts.items():
        if not there.first_addresses:
            yield "error", host, f"does not know {first}, where all ranks meet", "enter it in DNS or /etc/hosts"
        elif all(map(_is_itself, there.first_addresses)) and host != nodes.answers[0].host:
            words = f"takes {first}, where all ranks meet, for itself ({there.first_addresses[0]})"
            yield "error", host, words, "correct its /etc/hosts"
        chosen = nodes.wanted.interface or there.environment.get("GLOO_SOCKET_IFNAME")
        if chosen is not None:
            known = [name for name in there.interfaces if name.startswith(chosen)]  # a prefix is enough for NCCL
            if not known:
                words = f"has no interface {chosen}, it has {', '.join(there.interfaces)}"
                yield "error", host, words, "correct network.interface"
            elif any(_is_itself(there.interfaces[name] or "") for name in known):
                yield "error", host, f"interface {chosen} leads to no other node", "correct network.interface"
            elif not any(there.interfaces[name] for name in known):
                yield "warning", host, f"interface {chosen} has no IPv4 address", "is it up?"
        elif not there.own_addresses or _is_itself(there.own_addresses[0]):
            leads = f"leads to {there.own_addresses[0]}" if there.own_addresses else "is unknown there"
            words = f"its own name {there.host} {leads}, so that ranks would wait where no other node can call"
            yield "error", host, words, "name a network.interface in the profile, or correct its /etc/hosts"


def _port_problems(nodes: Nodes) -> Problems:
    host, there = next(iter(nodes.facts.items()))
    if there.busy_port is not None and nodes.wanted.port_is_fixed:
        yield "error", host, there.busy_port, "free it, or name another network.rendezvous_port"
    elif there.busy_port is not None:
        yield "warning", host, there.busy_port, "the next attempt takes another one, at the cost of a restart"


# ---------------------------------------------------------------- in a few words


def _is_itself(address: str) -> bool:
    return address in _ITSELF


def _size(size: int | None) -> str:
    if size is None:
        return "unlimited"
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:,} bytes"


def _versions(nodes: Nodes) -> str:
    versions = next(iter(nodes.facts.values())).versions
    named = ("python", "torch", "deepspeed", "transformers")
    return f"dstrain {nodes.here.code}, " + ", ".join(f"{name} {versions[name]}" for name in named)


def _clocks(nodes: Nodes) -> str:
    return f"within {CLOCK_TOLERANCE_SECONDS:.0f} s"


def _devices(nodes: Nodes) -> str:
    there = next(iter(nodes.facts.values()))
    if not there.visible_devices:
        return f"none, {there.cores} cores: ranks run on the CPU"
    return f"{there.visible_devices} of {', '.join(sorted(set(there.devices))) or 'unknown model'} on each node"


def _paths(nodes: Nodes) -> str:
    if not nodes.wanted.has_recipe:
        return "no recipe: no files are known"
    digests = next(iter(nodes.facts.values())).corpora.values()
    shown = ", ".join(digest[:12] for digest in digests)
    return f"the recipe's files are there{f'; corpora {shown}' if shown else ''}"


def _folder(nodes: Nodes) -> str:
    there = next(iter(nodes.facts.values()))
    speeds = [facts.bytes_per_second for facts in nodes.facts.values() if facts.bytes_per_second]
    measured = f", {median(speeds) / 1e6:,.0f} MB/s written by each node at once" if speeds else ""
    return f"shared and writable ({there.file_system}{measured})"


def _room(nodes: Nodes) -> str:
    free = min(facts.free_bytes for facts in nodes.facts.values())
    if not nodes.wanted.has_recipe:
        return f"{_size(free)} free"
    return f"{_size(free)} free, {_size(nodes.wanted.room_bytes)} needed for checkpoints"


def _shm(nodes: Nodes) -> str:
    return f"at least {_size(min(facts.shm_free_bytes or 0 for facts in nodes.facts.values()))} free"


def _limits(nodes: Nodes) -> str:
    limits = next(iter(nodes.facts.values())).limits
    shown = {name: "unlimited" if value is None else f"{value:,}" for name, value in limits.items()}
    locked = _size(limits["locked memory"])
    return f"open files {shown['open files']}, processes {shown['processes']}, locked memory {locked}"


def _network(nodes: Nodes) -> str:
    if nodes.wanted.nodes == 1:
        return "one node: the loopback device"
    first = next(iter(nodes.facts.values()))
    return f"all find {nodes.answers[0].host} ({', '.join(first.first_addresses)})"


def _port(nodes: Nodes) -> str:
    return "free" if nodes.wanted.nodes > 1 else "one node: any free one"


def _answered(nodes: Nodes) -> str:
    return f"{', '.join(nodes.facts)} answered"


CHECKS = (
    Check("nodes", _answer_problems, _answered),
    Check("versions", _version_problems, _versions),
    Check("clocks", _clock_problems, _clocks),
    Check("devices", _device_problems, _devices),
    Check("files", _path_problems, _paths),
    Check("run folder", _folder_problems, _folder),
    Check("room", _room_problems, _room),
    Check("/dev/shm", _shm_problems, _shm),
    Check("limits", _limit_problems, _limits),
    Check("network", _network_problems, _network),
    Check("port", _port_problems, _port),
)
