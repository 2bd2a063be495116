"""Which rank is blamed when all stand still; and that a child which does is found, and ended."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.base.phases import RankPhase
from dstrain.diagnose.causes import explain
from dstrain.diagnose.failure import Hang, RankFailure
from dstrain.diagnose.flight_recorder import have_recorded, recorder_environment
from dstrain.diagnose.stacks import in_log, shortened, spied
from dstrain.diagnose.verdict_text import how_it_failed
from dstrain.diagnose.watch import Watch, hanging
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.heartbeat import Heartbeat, read_heartbeats
from dstrain.rundir.run_folder import read_json

pytestmark = pytest.mark.slow

CHILD = """
import sys, time
from dstrain.diagnose.flight_recorder import have_recorded, recorder_environment
from dstrain.rundir.heartbeat import HeartbeatWriter
from dstrain.base.phases import RankPhase
heartbeat = HeartbeatWriter(int(sys.argv[1]))
for step in range(int(sys.argv[2])):
    heartbeat.begin(RankPhase.FORWARD, step)
phase = RankPhase.BACKWARD if sys.argv[3] == "moving" else RankPhase(sys.argv[3])
heartbeat.begin(phase)
print("ready", flush=True)
while True:
    time.sleep(0.05)
    if sys.argv[3] == "moving":
        heartbeat.begin(phase)
"""
HERE = Heartbeat(rank=0, pid=1, count=10, monotonic=100.0, step=3, phase=RankPhase.AGREE)


def test_a_rank_is_blamed_only_for_what_cannot_be_waiting() -> None:
    waits = [HERE, replace(HERE, rank=1)]
    assert hanging(waits, 109.0, 10.0) is None  # not long enough
    assert hanging(waits, 120.0, 10.0) is None  # they wait, perhaps for a rank of another node
    stopped = replace(HERE, rank=1, is_stopped=True)
    assert hanging([HERE, stopped], 120.0, 10.0) is stopped
    assert hanging([HERE, replace(stopped, monotonic=115.0)], 120.0, 10.0) is None  # only just
    reads = replace(HERE, rank=1, phase=RankPhase.DATA)
    assert hanging([HERE, reads], 120.0, 10.0) is reads
    assert hanging([replace(HERE, monotonic=119.0), reads], 120.0, 10.0) is reads
    behind = replace(HERE, rank=1, count=9, phase=RankPhase.BACKWARD)
    assert hanging([HERE, behind], 120.0, 10.0) is behind
    assert hanging([replace(HERE, monotonic=119.0), behind], 120.0, 10.0) is None  # another one still moves
    assert hanging([behind], 120.0, 10.0) is None  # nobody here to compare with
    assert hanging([behind], 120.0, 10.0, lambda: [10.0, 10.0]) is behind  # but on other nodes
    assert hanging([behind], 120.0, 10.0, lambda: [10.0, 9.0]) is None
    assert hanging([HERE, behind], 120.0, 10.0, lambda: [8.0]) is None  # one there is further behind
    assert hanging([HERE, behind], 120.0, 10.0, lambda: None) is None  # somebody still moves
    assert hanging([], 120.0, 10.0, lambda: [10.0]) is None
    in_a_save = [
        replace(HERE, count=10.4, phase=RankPhase.SAVE_VOTE),
        replace(HERE, rank=1, count=10.3, phase=RankPhase.SAVE_WRITE),
    ]
    assert hanging(in_a_save, 120.0, 10.0) is in_a_save[1]


@pytest.mark.parametrize(
    ("is_stopped", "phase", "how", "cause"),
    [
        (True, "backward", "its process was stopped", "something stopped its process"),
        (False, "data", "it stood still", "its data process made no rows"),
        (False, "step", "it stood still", "it hangs, and the other ranks waited for it"),
    ],
)
def test_a_hang_has_a_cause_and_a_remedy(is_stopped: bool, phase: str, how: str, cause: str) -> None:
    failure = RankFailure(1, "a", -signal.SIGKILL, 1.0, hang=Hang(RankPhase(phase), 12.0, is_stopped))
    assert how_it_failed(failure) == f"{how} for 12 s in phase {phase}, and was killed"
    assert not failure.is_consequence
    found, remedy = explain(failure, 0)
    assert found.startswith(cause)
    assert remedy


def test_the_child_that_stands_still_is_found_and_ended_and_the_other_is_not(tmp_path: Path) -> None:
    def start(rank: int, phase: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", CHILD, str(rank), "5", phase]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        return child

    ignored = signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited: these children have no stacks to show
    children = [start(0, "moving"), start(1, "moving")]
    try:
        assert [(heartbeat.rank, heartbeat.pid, heartbeat.step) for heartbeat in read_heartbeats()] == [
            (rank, child.pid, 4) for rank, child in enumerate(children)
        ]
        watching = Watch(tmp_path, 1, [0, 1], limit_seconds=2.0)
        os.kill(children[1].pid, signal.SIGSTOP)
        assert children[1].wait(timeout=60) == -signal.SIGKILL
        watching.end()
        assert children[0].poll() is None
        hang = json.loads((tmp_path / "attempts/0001/hangs/rank-00001.json").read_text())
        assert (hang["rank"], hang["phase"], hang["is_stopped"]) == (1, "backward", True)
        assert 2.0 <= hang["seconds"] < 60.0
        assert hang["stack"][0].startswith("<module> (<string>:")
        assert time.time() - hang["time_unix"] < 60.0
        assert not (tmp_path / "attempts/0001/hangs/rank-00000.json").exists()
    finally:
        signal.signal(signal.SIGUSR2, ignored)
        for child in children:
            child.kill()
            child.communicate()
    assert read_heartbeats() == []


def test_a_rank_that_is_alone_on_its_node_is_blamed_once_those_of_other_nodes_are_known_to_wait(tmp_path: Path) -> None:
    folder = tmp_path / "status/nodes"
    folder.mkdir(parents=True)

    def other_node(**changes: object) -> None:
        rank = {"rank": 0, "phase": "backward", "is_stopped": False, "count": 9.0, "seconds": 60.0, **changes}
        write_json(folder / "node-00000.json", {"attempt": 1, "ranks": [rank]})

    def seconds() -> float:
        ranks = read_json(folder / "node-00001.json").get("ranks") or [{"seconds": 0.0, "phase": "starting"}]
        return float(ranks[0]["seconds"]) if ranks[0]["phase"] == "forward" else 0.0

    def wait_until_looked() -> None:
        deadline = time.monotonic() + 60
        for _ in range(2):  # it looks after it has written: the second time, the first look is over
            before = seconds()
            while not 2.0 < seconds() > before:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    child = subprocess.Popen([sys.executable, "-c", CHILD, "1", "5", "forward"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        watching = Watch(tmp_path, 1, [1], limit_seconds=1.0, node=1, nodes=2, status_every_seconds=0.2)
        # not known, still moving, behind as well, blamed by its own agent: by its phase, or since it is stopped
        for changes in ({}, {"seconds": 0.1}, {"count": 6.0}, {"phase": "data"}, {"is_stopped": True}):
            if changes:
                other_node(**changes)
            wait_until_looked()
            assert child.poll() is None
        other_node()
        assert child.wait(timeout=60) != 0
        watching.end()
        hang = json.loads((tmp_path / "attempts/0001/hangs/rank-00001.json").read_text())
        assert (hang["rank"], hang["phase"], hang["is_stopped"]) == (1, "forward", False)
    finally:
        child.kill()
        child.communicate()


def test_without_py_spy_the_stack_is_taken_from_what_faulthandler_wrote(tmp_path: Path) -> None:
    def stands_here(log: Path) -> None:
        with log.open("a") as file:
            file.write("Current thread is a word of the log's own\n")
            faulthandler.dump_traceback(file)
            file.write("12:00:00 it goes on\n")

    stands_here(tmp_path / "rank.log")
    first, second, *_ = in_log(tmp_path / "rank.log")
    assert first.startswith("stands_here (tests/launch/test_heartbeat.py:")
    assert second.startswith("test_without_py_spy_")
    (tmp_path / "other.log").write_text("nothing of that kind\n")
    assert in_log(tmp_path / "other.log") == in_log(tmp_path / "none.log") == ()


def test_a_long_stack_is_shown_by_its_ends() -> None:
    library = [f"f{number} (torch/a.py:{number})" for number in range(9)]
    ours = [f"g{number} (dstrain/train/loop.py:{number})" for number in range(9)]
    assert shortened([*library, *ours]) == (*library[:6], "…", *ours[:2])
    assert shortened([*library[:5], *ours]) == (*library[:5], ours[0])
    assert shortened(library) == tuple(library[:6])


def test_a_process_that_is_gone_has_no_stack() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert spied(child.pid) == []


def test_nccls_recorder_is_asked_through_its_pipe_and_never_waited_for(tmp_path: Path) -> None:
    stem = recorder_environment(tmp_path / "attempt", tmp_path)["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"]
    assert not have_recorded(None, 3)
    assert not have_recorded(stem, 3)  # no pipe
    os.mkfifo(tmp_path / "rank-3.pipe")
    assert not have_recorded(stem, 3)  # nobody reads it
    reader = os.open(tmp_path / "rank-3.pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert have_recorded(stem, 3)
    assert os.read(reader, 8) == b"1"
    os.close(reader)
