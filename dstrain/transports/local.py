"""`transport: local`: this machine, as a single node, in the environment that the profile says."""

import socket
from collections.abc import Sequence

from dstrain.base.devices import count_devices
from dstrain.transport.channel import Channel
from dstrain.transport.command import Cluster
from dstrain.transport.hostfile import Host
from dstrain.transport.node_script import entry_command
from dstrain.transport.profile import Profile
from dstrain.transport.transport import Transport


class Local(Transport):
    """This machine."""

    most_nodes = 1
    is_this_terminal = True

    def hosts(self, profile: Profile) -> Sequence[Host]:
        """This one."""
        return (Host(socket.gethostname(), None),)

    def channels(self, cluster: Cluster) -> tuple[Channel, ...]:
        """A shell here."""
        return (Channel((0,), entry_command(0)),)

    def ranks_of_node(self) -> int:
        """One for each device; a single one on the CPU."""
        return count_devices() or 1


TRANSPORT = Local()
