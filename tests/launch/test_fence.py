import io
import threading
import time
from pathlib import Path

import pytest

from dstrain.diagnose.evidence import rank_failures
from dstrain.observe.progress import RunProgress
from dstrain.rundir.attempt_files import write_json
from dstrain.supervise.fence import silent_nodes, wait_for_silent_nodes
from dstrain.transport.launchers import LauncherEnd
from dstrain.transport.stops import Stops

LOST = [LauncherEnd({0: "node1"}, 1), LauncherEnd({1: "node2"}, 255, is_lost=True)]


def report(attempt: Path, node: int, **more: object) -> None:
    written = {"node": node, "host": f"node{node + 1}", "failures": [], "signal": "nothing was heard", **more}
    write_json(attempt / f"agents/node-{node:05d}.json", written)


def wait(attempt: Path, silence_seconds: float) -> tuple[float, str]:
    """How long it took, and what was said."""
    output, began = io.StringIO(), time.monotonic()
    with RunProgress(output, "tiny") as progress:
        wait_for_silent_nodes(attempt, LOST, silence_seconds, Stops(), progress)
    return time.monotonic() - began, output.getvalue()


def test_a_lost_node_is_silent_until_its_agent_has_ended_all(tmp_path: Path) -> None:
    assert silent_nodes(tmp_path, LOST) == {1: "node2"}  # node1 was reached to the end: its exit code says how it ended
    report(tmp_path, 1, lost_supervisor=True, is_ending=True)
    assert silent_nodes(tmp_path, LOST) == {1: "node2"}
    report(tmp_path, 1, lost_supervisor=True)
    assert silent_nodes(tmp_path, LOST) == {}
    assert wait(tmp_path, 60)[1] == ""


def test_the_waiting_ends_with_the_agents_word(tmp_path: Path) -> None:
    teller = threading.Timer(0.5, report, (tmp_path, 1), {"lost_supervisor": True})
    teller.start()
    seconds, said = wait(tmp_path, 600)
    teller.join()
    assert 0.4 < seconds < 60
    assert "waiting for node2 to give up, at most 600 s" in said


@pytest.mark.slow
def test_the_waiting_ends_when_the_agent_must_have_given_up(tmp_path: Path) -> None:
    assert wait(tmp_path, 0.5)[0] >= 3.5


def test_a_node_that_was_cut_off_is_a_failure_though_its_agent_has_reported_meanwhile(tmp_path: Path) -> None:
    report(tmp_path, 0, lost_supervisor=True)  # the supervisor hung up, and could be told so
    report(tmp_path, 1, lost_supervisor=True)
    (failure,) = rank_failures(tmp_path, LOST, 7, time.time())
    assert (failure.rank, failure.host, failure.exit_code) == (None, "node2", 255)
