"""A process of the supervisor's machine that starts agents on nodes, and passes on its standard input to them.

What it is given is pure, so that `--dry-run` shows exactly what would run; `start` acts.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.environment import variables
from dstrain.transport.launchers import Launcher, launcher_log


@dataclass(frozen=True)
class Channel:
    """The way to some nodes: a command whose standard input becomes that of their agents."""

    nodes: tuple[int, ...]  # their numbers
    arguments: tuple[str, ...]
    lost_codes: frozenset[int] = frozenset()  # exit codes that say: the node, or the way to it, was lost

    def as_shell(self, script: str) -> str:
        """The same as lines for a POSIX shell: the script, and then the supervisor's signs of life."""
        end = end_marker(script)
        return f"{SIGNS_OF_LIFE} <<'{end}' | {shlex.join(self.arguments)}\n{script}{end}"

    def start(self, hosts: Mapping[int, str], attempt_folder: Path, script: str) -> Launcher:
        """Start it.

        Args:
            hosts: its nodes' names, by their numbers.
            attempt_folder: where the log goes.
            script: what every node runs, see `dstrain.transport.node_script`.
        """
        log = launcher_log(attempt_folder, hosts[self.nodes[0]])
        return Launcher(hosts, self.arguments, variables(), log, script, lost_codes=self.lost_codes)


SIGNS_OF_LIFE = "{ cat; while sleep 5 && echo; do :; done; }"  # for a shell: the script, and then a line now and then


def end_marker(script: str) -> str:
    """A line that the script does not have, to end a here-document with."""
    end = "END OF NODE SCRIPT"
    while end in script.splitlines():
        end += "."
    return end
