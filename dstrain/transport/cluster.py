"""From a profile to the nodes of a run: which hosts, how many of them, and what is set up on each."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.base.code_digest import code_digest
from dstrain.base.environment import variables, working_folder
from dstrain.errors import UserError
from dstrain.plan import batch_plan, most_ranks
from dstrain.recipe.schema import Recipe
from dstrain.rundir.timings import Timings
from dstrain.transport.command import Cluster
from dstrain.transport.hostfile import Host
from dstrain.transport.node_script import LOST_AFTER_SECONDS, NodeSettings
from dstrain.transport.profile import Profile
from dstrain.transport.transport import TRANSPORTS

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
    """The hosts of a run that is supervised from here, and how many ranks each gets.

    Args:
        profile: says which hosts there are.
        recipe: decides how many ranks there may be.
        nodes: fewest and most.
        ranks: of each host; None takes the hosts' slots.

    Raises:
        UserError: the hosts cannot be told, or there are too few hosts or slots.
    """
    transport = TRANSPORTS[profile.transport]
    hosts = transport.hosts(profile)
    if len(hosts) < nodes[0]:
        words = f"{nodes[0]} nodes are asked for, and {transport.hosts_place(profile)} has {len(hosts)}"
        raise UserError(f"{words} after the filters; add hosts")
    return choose_hosts(hosts, recipe, nodes, ranks or transport.ranks_of_node())


def spare_hosts(listed: Sequence[Host], used: Sequence[str], ranks: int) -> tuple[str, ...]:
    """Those with slots enough that a run does not use: they can stand in for one that is lost."""
    return tuple(host.name for host in listed if host.name not in used and (host.slots or ranks) >= ranks)


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
    if ranks is None:
        raise UserError("procs_per_node is missing; say how many ranks a node gets")
    small = [f"{host.name} has {host.slots}" for host in hosts if host.slots is not None and host.slots < ranks]
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


def make_cluster(
    profile: Profile, hosts: Sequence[str], folder: Path | None = None, code: str | None = None
) -> Cluster:
    """These hosts as the profile sets them up.

    Args:
        profile: the profile.
        hosts: in the order of their numbers.
        folder: where ranks work; None: that of this command.
        code: digest of the source that has to run there; None: of the one here.

    Raises:
        UserError: a variable that is to be passed on is not set, or what the transport needs here is missing.
    """
    transport = TRANSPORTS[profile.transport]
    network = profile.network
    return Cluster(
        transport=transport.starter(profile),
        hosts=tuple(hosts),
        settings=node_settings(profile, working_folder() if folder is None else folder, variables()),
        rendezvous_port=network.rendezvous_port,
        code=code_digest() if code is None else code,
        section=profile.section,
        lost_after_seconds=network.lost_after_seconds if transport.loses_connections else LOST_AFTER_SECONDS,
    )


def stop_timeout_seconds(profile: Profile, timings: Timings, seconds_left: float | None = None) -> int:
    """How long ranks have from the word to stop: as the profile says; else ten minutes, or what a queue leaves."""
    if profile.shutdown_timeout_seconds is not None:
        return profile.shutdown_timeout_seconds
    if TRANSPORTS[profile.transport].queue is None:
        return SHUTDOWN_TIMEOUT_SECONDS
    return max(1, round(timings.lead_seconds(seconds_left) - _END_SECONDS))
