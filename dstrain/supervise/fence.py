"""Before another attempt begins: is a node that was lost still at work on the last one?

When a link is cut, the supervisor gives up the node after `lost_after_seconds`; the node's agent, which hears nothing
either, ends its ranks after twice that. In between they may still write, where the run's folder is reachable for them.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.diagnose import evidence
from dstrain.observe.progress import RunProgress
from dstrain.transport.launchers import LauncherEnd
from dstrain.transport.stops import Stops

_MARGIN_SECONDS = 3.0  # for the agent to kill its ranks


def silent_nodes(attempt_folder: Path, ends: Sequence[LauncherEnd]) -> dict[int, str]:
    """Nodes, by their numbers, whose connection was lost and whose agent has not said yet that all has ended there."""
    reports = evidence.agent_reports(attempt_folder)
    lost = {node: host for end in ends if end.is_lost for node, host in end.hosts.items()}
    return {node: host for node, host in lost.items() if node not in reports or reports[node].get("is_ending")}


def wait_for_silent_nodes(
    attempt_folder: Path,
    ends: Sequence[LauncherEnd],
    silence_seconds: float,
    stops: Stops,
    progress: RunProgress,
) -> None:
    """Until every lost node has ended its ranks, by its own word or because it must have given up by now.

    A second Ctrl-C ends the waiting.
    """
    silent: Mapping[int, str] = silent_nodes(attempt_folder, ends)
    if silent:
        words = f"waiting for {', '.join(silent.values())} to give up, at most {silence_seconds:.0f} s"
        progress.note(f"{words}, so that no two attempts write at once")
    deadline = time.monotonic() + silence_seconds + _MARGIN_SECONDS
    while silent and time.monotonic() < deadline and stops.interrupts < 2:
        time.sleep(0.2)
        silent = silent_nodes(attempt_folder, ends)
