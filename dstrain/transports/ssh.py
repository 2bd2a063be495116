"""`transport: ssh`: the hosts of a host file, over a connection each, supervised from where `dstrain run` was typed."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from dstrain.base.processes import run
from dstrain.base.section import Section
from dstrain.errors import UserError
from dstrain.transport.channel import Channel
from dstrain.transport.command import Cluster
from dstrain.transport.hostfile import Host, read_hostfile
from dstrain.transport.node_script import entry_command
from dstrain.transport.profile import Profile, Text
from dstrain.transport.transport import Transport

SSH = (
    *("ssh", "-T", "-a", "-x"),
    *("-o", "BatchMode=yes"),  # never asks for a password
    *("-o", "StrictHostKeyChecking=yes"),  # an unknown or changed host key is refused
    *("-o", "ConnectTimeout=15"),
)
_SIGNS_OF_LIFE = 6  # that a host may miss


class HostList(Section):
    """Which machines: those of a host file, in its order, after the filters."""

    file: Text
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()


class Hosts(HostList):
    """Also what starts the connections."""

    launcher: Literal["auto", "pdsh", "openssh"] = "auto"  # auto: pdsh where it is installed


class OverSsh(Transport):
    """What `ssh` and `pdsh` have in common: hosts of a file, and connections that may be lost."""

    section_name = "hosts"
    section: ClassVar[type[HostList]] = HostList
    section_example = "{file: …}"
    loses_connections = True
    lost_codes = frozenset({255})  # ssh: the connection could not be made, or broke; not an exit code of the agent

    def hosts(self, profile: Profile) -> Sequence[Host]:
        """Those of the host file, after its filters."""
        section = host_list(profile)
        return read_hostfile(Path(section.file).expanduser(), section.include, section.exclude)

    def hosts_place(self, profile: Profile) -> str:
        """The host file."""
        return str(Path(host_list(profile).file).expanduser())

    def probes(self, cluster: Cluster) -> tuple[Channel, ...]:
        """A connection for each host."""
        return ssh_channels(cluster.hosts, cluster.lost_after_seconds)

    def reach_remedy(self, host: str) -> str:
        """The same connection by hand."""
        return f"try `ssh {host} true`; it must work without a question"


class Ssh(OverSsh):
    """A process of OpenSSH for each host, or pdsh where that is installed."""

    section: ClassVar[type[HostList]] = Hosts

    def starter(self, profile: Profile) -> str:
        """`pdsh`, where it is wanted or else installed."""
        section = host_list(profile)
        assert isinstance(section, Hosts)
        if section.launcher == "openssh":
            return profile.transport
        missing = what_pdsh_lacks()
        if missing is None:
            return "pdsh"
        if section.launcher == "pdsh":
            raise UserError(f"hosts.launcher=pdsh: {missing}, or write `launcher: openssh`")
        return profile.transport

    def channels(self, cluster: Cluster) -> tuple[Channel, ...]:
        """A connection for each host."""
        return ssh_channels(cluster.hosts, cluster.lost_after_seconds)


TRANSPORT = Ssh()


def ssh_channels(hosts: Sequence[str], lost_after_seconds: int) -> tuple[Channel, ...]:
    """A connection for each host. The remote shell gets one word list, quoted for it, without anything secret.

    A host that gives no sign of life for `lost_after_seconds` is lost: its connection ends with 255.
    """
    ssh = ssh_command(lost_after_seconds)
    return tuple(
        Channel((node,), (*ssh, host, remote_command(node)), OverSsh.lost_codes) for node, host in enumerate(hosts)
    )


def remote_command(node: int) -> str:
    """What the remote shell gets. It stays, and tells of an agent that was killed: ssh would call that a lost link."""
    return f"{shlex.join(entry_command(node))}; exit"


def ssh_command(lost_after_seconds: int) -> tuple[str, ...]:
    """ssh and its options, before the host."""
    alive = ("-o", f"ServerAliveInterval={lost_after_seconds // _SIGNS_OF_LIFE}")
    return (*SSH, *alive, "-o", f"ServerAliveCountMax={_SIGNS_OF_LIFE}", "--")


def host_list(profile: Profile) -> HostList:
    """The profile's section."""
    assert isinstance(profile.section, HostList)
    return profile.section


def what_pdsh_lacks() -> str | None:
    """Why pdsh cannot be used on this machine, and what to do; None where it can."""
    if shutil.which("pdsh") is None:
        return "pdsh is not on this machine; install it"
    if "exec" not in run(["pdsh", "-V"]).output:
        return "this pdsh was built without its module `exec`; use another build"
    return None
