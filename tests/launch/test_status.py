"""What `dstrain status` and `dstrain stop` find of a run that lives, has ended, is lost, or is somewhere else."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.base.phases import RankPhase
from dstrain.cli import main, parse
from dstrain.diagnose.watch import Pace, Watch
from dstrain.errors import UserError
from dstrain.observe.run_record import RunRecord, State, lock_holder, state_of_run
from dstrain.observe.status import NodeStatus, RankStatus, RunStatus, Straggler, run_status, stragglers
from dstrain.observe.status_page import page
from dstrain.observe.stop import stop_command
from dstrain.rundir.heartbeat import Heartbeat
from dstrain.rundir.run_folder import exclusive

RECORD = RunRecord(
    name="tiny",
    transport="local",
    host=socket.gethostname(),
    pid=1,
    hosts=("here",),
    ranks=2,
    shutdown_timeout_seconds=5,
    started_unix=1.0,
)
RANK = RankStatus(0, 4712, RankPhase.FORWARD, 1200, 0.2, False, 0.21, 1.0)
STEPPING = """
import sys, time
from dstrain.base.phases import RankPhase
from dstrain.rundir.heartbeat import HeartbeatWriter
rank = int(sys.argv[1])
heartbeat, own_seconds = HeartbeatWriter(rank), (0.02, 0.15)[rank]
for step in range(1, 1000):
    heartbeat.begin(RankPhase.FORWARD)
    time.sleep(own_seconds)
    heartbeat.begin(RankPhase.AGREE)
    time.sleep(0.2 - own_seconds)
    heartbeat.begin(RankPhase.MADE, step)
"""
PAGE = """\
bert  runs/bert
state      forward; 3 ranks on 2 nodes; ssh, supervisor 4711 on login
part       phase 2 of 3, context
step       1,200/10,000 (12 %), loss 3.1234 (web 3.20, code 2.80), 12,345 tok/s, 1:02:03 left
saved      step 1,000, 0:01:20 ago
attempts   2
time       1:00:00: computing 83.3 %, saving 16.7 %, lost to restarts 0.0 %
verdict    attempt 1: rank 1 on node2: it hangs; restart: 1 of 3
straggler  rank 2 on node2: 0.42 s of its own in a step of 1 s, the median is 0.21 s

node 0  node1
  rank      pid  phase                   for        step  own s/step
     0     4712  forward             0:00:00       1,200        0.21
     1     4713  data (SIGSTOP)      0:01:30       1,199        0.21

node 1  node2  (no word for 0:00:45)
  rank      pid  phase                   for        step  own s/step
     2        –  starting            0:00:10           0           –"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "attempts/0001").mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    return folder


def test_the_page() -> None:
    stopped = replace(RANK, rank=1, pid=4713, phase=RankPhase.DATA, step=1199, seconds=90.0, is_stopped=True)
    starting = RankStatus(2, None, "starting", 0, 10.0, False, None, None)
    status = RunStatus(
        run="runs/bert",
        name="bert",
        state="running",
        exit_code=None,
        ended_seconds_ago=None,
        transport="ssh",
        supervisor_host="login",
        supervisor_pid=4711,
        job=None,
        jobs=(),
        attempts=2,
        last_verdict="rank 1 on node2: it hangs; restart: 1 of 3",
        last_verdict_attempt=1,
        phase=RankPhase.FORWARD,
        part="phase 2 of 3, context",
        step=1200,
        total_steps=10_000,
        loss=3.1234,
        source_losses={"web": 3.201, "code": 2.8},
        tokens_per_second=12_345.4,
        seconds_left=3723.0,
        checkpoint_step=1000,
        checkpoint_age_seconds=80.0,
        run_seconds={"computing": 3000.0, "data": 0.0, "saving": 600.0, "lost": 0.5},
        nodes=(
            NodeStatus(0, "node1", 1.0, False, (RANK, stopped)),
            NodeStatus(1, "node2", 45.0, False, (starting,)),
        ),
        stragglers=(Straggler(2, "node2", 0.42, 0.21, 1.0),),
    )
    assert page(status) == PAGE
    many = (*(replace(RANK, rank=rank, phase=RankPhase.AGREE) for rank in range(16)), replace(stopped, rank=16))
    crowded = page(replace(status, nodes=(NodeStatus(0, "node1", 1.0, False, many),)))
    assert crowded.endswith("  17 ranks: agree 16, data 1\n  longest: rank 16, data (SIGSTOP) for 0:01:30")
    ended = replace(status, state="ended", exit_code=75, ended_seconds_ago=60.0)
    assert "\nstate      stopped 0:01:00 ago; the same `dstrain run` goes on\n" in page(ended)
    assert "node1" not in page(ended)
    assert "state      failed 0:01:00 ago, exit code 1" in page(replace(ended, exit_code=1))
    assert "state      waits in SLURM's queue, job 7, 8" in page(replace(status, state="queued", jobs=("7", "8")))


def test_a_straggler_costs_a_tenth_of_the_step() -> None:
    def node(*own: float | None) -> NodeStatus:
        ranks = (replace(RANK, rank=rank, own_step_seconds=seconds) for rank, seconds in enumerate(own))
        return NodeStatus(0, "node1", 1.0, False, tuple(ranks))

    assert stragglers([node(0.2, 0.2, 0.29)]) == ()
    assert stragglers([node(0.2, 0.2), node(0.31, None)]) == (Straggler(0, "node1", 0.31, 0.2, 1.0),)
    assert [found.rank for found in stragglers([node(0.5, 0.2, 0.2, 0.9, 0.2)])] == [3, 0]
    assert stragglers([node(0.9, None)]) == stragglers([]) == ()


def test_the_pace_of_a_rank_is_the_median_of_its_steps() -> None:
    pace, heartbeat = Pace(), Heartbeat(0, 1, 0, monotonic=10.0, step=0, phase=RankPhase.MADE, own_seconds=5.0)
    for seconds, own in [(9.0, 8.0), (1.0, 0.4), (1.0, 0.4), (30.0, 29.0), (1.2, 0.5)]:  # the first compiles
        heartbeat = replace(heartbeat, step=heartbeat.step + 1)
        heartbeat = replace(heartbeat, monotonic=heartbeat.monotonic + seconds, own_seconds=heartbeat.own_seconds + own)
        pace.observe(heartbeat)
        pace.observe(
            replace(
                heartbeat, phase=RankPhase.DATA, monotonic=heartbeat.monotonic + 0.1, own_seconds=heartbeat.own_seconds
            )
        )
    assert pace.as_json() == {"own_step_seconds": 0.45, "step_seconds": 1.1}
    assert Pace().as_json() == {"own_step_seconds": None, "step_seconds": None}


@pytest.mark.slow
def test_a_slow_rank_is_seen_from_its_heartbeats(run_dir: Path) -> None:
    slow_and_fast = [subprocess.Popen([sys.executable, "-c", STEPPING, str(rank)]) for rank in (0, 1)]
    watching = Watch(run_dir, 1, [0, 1], limit_seconds=60.0)
    try:
        deadline = time.monotonic() + 60
        # on a busy machine the first medians may be anything
        while not (found := stragglers(run_status(run_dir, time.time()).nodes)) or found[0].rank != 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        watching.end()
        for process in slow_and_fast:
            process.kill()
            process.wait()
    assert [(straggler.rank, straggler.host) for straggler in found] == [(1, socket.gethostname())]
    assert 0.15 <= found[0].own_step_seconds < found[0].step_seconds


def test_a_node_says_what_its_ranks_do_and_that_they_have_ended(run_dir: Path) -> None:
    watching = Watch(run_dir, 1, [2, 3], limit_seconds=60.0, node=1)
    deadline = time.monotonic() + 30
    while not (run_dir / "status/nodes/node-00001.json").exists():
        assert time.monotonic() < deadline
    (node,) = run_status(run_dir, time.time()).nodes
    assert (node.node, node.host, node.is_over) == (1, socket.gethostname(), False)
    assert [(rank.rank, rank.phase, rank.pid) for rank in node.ranks] == [(2, "starting", None), (3, "starting", None)]
    watching.end()
    (node,) = run_status(run_dir, time.time()).nodes
    assert node.is_over and {rank.phase for rank in node.ranks} == {"ended"}
    (run_dir / "attempts/0002").mkdir()
    assert run_status(run_dir, time.time()).nodes == ()  # they are of the attempt before


@pytest.mark.parametrize(
    ("record", "state"),
    [
        (None, "ended"),
        (RECORD, "lost"),
        (replace(RECORD, ended_unix=2.0, exit_code=0), "ended"),
        (replace(RECORD, host="elsewhere", transport="ssh"), "running"),
    ],
)
def test_whether_a_run_is_there(run_dir: Path, record: RunRecord | None, state: State) -> None:
    if record is not None:
        record.write(run_dir)
        assert RunRecord.read(run_dir) == record
    assert state_of_run(run_dir, record, time.time()) == state
    with exclusive(run_dir):
        assert lock_holder(run_dir) == os.getpid()
        assert state_of_run(run_dir, record, time.time()) == "running"
    assert lock_holder(run_dir) is None  # the number is still in the file
    if state == "running":  # as far as its last sign of life tells
        assert state_of_run(run_dir, record, time.time() + 61) == "silent"


def test_stop_says_why_there_is_nothing_to_stop(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", str(run_dir)]) == 0
    RECORD.write(run_dir)
    assert main(["stop", str(run_dir)]) == 0
    assert capsys.readouterr().out == (
        f"{run_dir} is not running; no checkpoint yet\n"
        f"{run_dir} is not running (its supervisor was killed, or its machine lost); no checkpoint yet\n"
    )
    replace(RECORD, host="login7", transport="ssh").write(run_dir)
    with pytest.raises(UserError, match=r"is supervised from login7 \(process 1\), and this is .*; run `dstrain stop`"):
        stop_command(parse(["stop", str(run_dir)]))


@pytest.mark.parametrize("command", ["status", "stop", "logs"])
def test_another_folder_is_refused(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert f"{tmp_path} is no run's folder: it has no recipe.yaml" in capsys.readouterr().err


def test_watching_ends_with_the_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(RECORD, ended_unix=time.time(), exit_code=0).write(run_dir)
    assert main(["status", str(run_dir), "--watch"]) == 0
    assert "state      done 0:00:00 ago" in capsys.readouterr().out


def test_a_status_costs_no_torch(run_dir: Path) -> None:
    words = "import sys; from dstrain.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", words, "status", str(run_dir)], check=True, capture_output=True)
