"""From a profile to the nodes of a run: which hosts, how many of them, and what is set up on each."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from dstrain.base.code_digest import code_digest
from dstrain.base.environment import variables, working_folder
from dstrain.errors import UserError
from dstrain.plan import batch_plan, most_ranks
from dstrain.recipe.schema import Recipe
from dstrain.rundir.timings import Timings
from dstrain.transport.command import Cluster
from dstrain.transport.hostfile import Host, read_hostfile
from dstrain.transport.node_script import NodeSettings
from dstrain.transport.profile import Profile

SHUTDOWN_TIMEOUT_SECONDS = 600  # from the word to stop to the killing of ranks
_END_SECONDS = 10.0  # between the last rank's end and that of a job


def usable_nodes(recipe: Recipe, ranks_per_node: int, fewest: int, most: int) -> int:
    """The greatest number of nodes between the two on which the recipe can be trained.

    Raises:
        RecipeError: the fewest already have more ranks than the recipe has rows for.
    """
    batch_plan(recipe, fewest * ranks_per_node)  # says why
    return min(most, most_ranks(recipe) // ranks_per_node)


def nodes_in_words(asked: tuple[int, int], there: int, used: int) -> str | None:
    """What is said of a range of nodes; None where it is a single number. Pure."""
    fewest, most = asked
    if fewest == most:
        return None
    rest = ", as there are rows for no more" if used < min(most, there) else ""
    return f"nodes {fewest}-{most}, and {there} there: {used} used{rest}"


def hosts_of(profile: Profile, recipe: Recipe, nodes: tuple[int, int], ranks: int | None) -> tuple[list[str], int]:
    """The hosts of an ssh run, and how many ranks each gets.

    Args:
        profile: names the host file.
        recipe: decides how many ranks there may be.
        nodes: fewest and most.
        ranks: of each host; None takes the hosts' slots.

    Raises:
        UserError: the host file cannot be used, or has too few hosts or slots.
    """
    assert profile.hosts is not None
    file, hosts = Path(profile.hosts.file).expanduser(), listed_hosts(profile)
    if len(hosts) < nodes[0]:
        raise UserError(f"{nodes[0]} nodes are asked for, and {file} has {len(hosts)} after the filters; add hosts")
    return choose_hosts(hosts, recipe, nodes, ranks)


def listed_hosts(profile: Profile) -> Sequence[Host]:
    """The hosts of the profile's host file, after its filters. Raises UserError."""
    assert profile.hosts is not None
    return read_hostfile(Path(profile.hosts.file).expanduser(), profile.hosts.include, profile.hosts.exclude)


def spare_hosts(listed: Sequence[Host], used: Sequence[str], ranks: int) -> tuple[str, ...]:
    """Those with slots enough that a run does not use: they can stand in for one that is lost."""
    return tuple(host.name for host in listed if host.name not in used and host.slots >= ranks)


def ssh_launcher(profile: Profile) -> Literal["openssh", "pdsh"]:
    """What starts the connections to the hosts: pdsh, where it is wanted or else installed.

    Raises:
        UserError: the profile wants pdsh, and it is not here or cannot start other programs than its own.
    """
    assert profile.hosts is not None
    wanted = profile.hosts.launcher
    if wanted == "openssh":
        return wanted
    if shutil.which("pdsh") is None:
        missing = "pdsh is not on this machine; install it"
    else:
        modules = subprocess.run(["pdsh", "-V"], capture_output=True, text=True, check=False).stdout
        if "exec" in modules:
            return "pdsh"
        missing = "this pdsh was built without its module `exec`; use another build"
    if wanted == "pdsh":
        raise UserError(f"hosts.launcher=pdsh: {missing}, or write `launcher: openssh`")
    return "openssh"


def choose_hosts(
    hosts: Sequence[Host], recipe: Recipe, nodes: tuple[int, int], ranks: int | None
) -> tuple[list[str], int]:
    """As many hosts from the beginning as there may be, and how many ranks each gets. Pure; see `hosts_of`."""
    hosts = hosts[: nodes[1]]
    slots = {host.slots for host in hosts}
    if ranks is None:
        if len(slots) > 1:
            shown = ", ".join(f"{host.name} {host.slots}" for host in hosts)
            raise UserError(f"hosts have different numbers of slots ({shown}); say --procs-per-node")
        (ranks,) = slots
    small = [f"{host.name} has {host.slots}" for host in hosts if host.slots < ranks]
    if small:
        raise UserError(f"--procs-per-node={ranks} is more than some hosts have slots: {', '.join(small)}")
    count = usable_nodes(recipe, ranks, nodes[0], len(hosts))
    return [host.name for host in hosts[:count]], ranks


def node_settings(profile: Profile, folder: Path, environment: Mapping[str, str]) -> NodeSettings:
    """What is set up on each node. `environment` is the submitting shell's, of which only what is named is taken.

    Raises:
        UserError: a variable that is to be passed on is not set.
    """
    missing = [name for name in profile.pass_environment if name not in environment]
    if missing:
        raise UserError(f"pass_environment names {', '.join(missing)}, which is not set in this shell; export it first")
    venv = None if profile.venv is None else str(Path(profile.venv).expanduser())
    return NodeSettings(
        folder=folder,
        python="python" if profile.container else supervisors_python(profile),
        environment=profile.environment,
        passed={name: environment[name] for name in profile.pass_environment},
        modules=profile.modules,
        venv=venv,
        container=profile.container,
        interface=profile.network.interface,
    )


def supervisors_python(profile: Profile) -> str:
    """The interpreter outside any container."""
    return sys.executable if profile.venv is None else str(Path(profile.venv).expanduser() / "bin" / "python")


def make_cluster(profile: Profile, hosts: Sequence[str]) -> Cluster:
    """These hosts as the profile sets them up, from here and now.

    Raises:
        UserError: a variable that is to be passed on is not set, or pdsh is missing.
    """
    cluster = Cluster(
        transport=profile.transport,
        hosts=tuple(hosts),
        settings=node_settings(profile, working_folder(), variables()),
        rendezvous_port=profile.network.rendezvous_port,
        cpus_per_task=None if profile.slurm is None else profile.slurm.cpus_per_task,
        code=code_digest(),
    )
    if profile.transport != "ssh":
        return cluster
    return replace(cluster, launcher=ssh_launcher(profile), lost_after_seconds=profile.network.lost_after_seconds)


def stop_timeout_seconds(profile: Profile, timings: Timings, seconds_left: float | None = None) -> int:
    """How long ranks have from the word to stop: as the profile says; else ten minutes, or what SLURM leaves."""
    if profile.shutdown_timeout_seconds is not None:
        return profile.shutdown_timeout_seconds
    if profile.slurm is None:
        return SHUTDOWN_TIMEOUT_SECONDS
    return max(1, round(timings.lead_seconds(seconds_left) - _END_SECONDS))
