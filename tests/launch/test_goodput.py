"""Where a run's time went: the parts sum to the whole, and what was done twice is lost."""

import json
import time
from pathlib import Path

import pytest

from dstrain.base.phases import RankPhase
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.goodput import PARTS, Attempt, read_attempts, run_seconds, seconds_at, seconds_before, split
from dstrain.rundir.wall_time import ATTEMPT_PARTS, WallTime, part_of, started_unix


def seconds(**parts: float) -> dict[str, float]:
    return dict.fromkeys(ATTEMPT_PARTS, 0.0) | parts


# Starts at 1000 s, saves step 10 at 1030 s, is at step 15 at 1042 s, where a rank is killed; noticed at 1045 s.
KILLED = Attempt(
    number=1,
    started_unix=1000.0,
    points=[
        (0, {"starting": 10.0}),
        (10, seconds(starting=10.0, computing=15.0, data=1.0)),
        (10, seconds(starting=10.0, computing=15.0, data=1.0, saving=4.0)),
        (15, seconds(starting=10.0, computing=25.0, data=3.0, saving=4.0)),
    ],
    accounted_unix=1042.0,
    ended_unix=1045.0,
    result="failed",
)
# Goes on from step 10 at 1047 s, is stopped at step 20, saved at 1080 s, gone at 1081 s.
STOPPED = Attempt(
    number=2,
    started_unix=1047.0,
    from_step=10,
    points=[
        (10, {"starting": 8.0}),
        (20, seconds(starting=8.0, computing=20.0, data=1.0, evaluating=1.0)),
        (20, seconds(starting=8.0, computing=20.0, data=1.0, evaluating=1.0, saving=3.0)),
    ],
    accounted_unix=1080.0,
    ended_unix=1081.0,
    result="stopped",
)
# Two minutes later again; it is in its first forward pass.
RUNNING = Attempt(3, 1201.0, 20, [(20, {"starting": 9.0})], accounted_unix=1210.0, phase=RankPhase.FORWARD)


def test_what_was_done_again_and_the_time_without_ranks_is_lost() -> None:
    parts = split([KILLED, STOPPED], 1081.0, 20)
    # steps 11 to 15: 10 s computing, 2 s of data; 3 s until it was noticed; 2 s until the next attempt
    assert parts == {
        "computing": 35.0,
        "data": 2.0,
        "saving": 7.0,
        "evaluating": 1.0,
        "starting": 19.0,  # with the second that the ranks took to end
        "lost": 17.0,
        "paused": 0.0,
    }
    assert sum(parts.values()) == 81.0


def test_time_after_a_stop_is_paused_and_the_present_belongs_to_the_phase() -> None:
    parts = split([KILLED, STOPPED, RUNNING], 1214.0, None)
    assert (parts["paused"], parts["starting"], parts["computing"], parts["lost"]) == (120.0, 28.0, 39.0, 17.0)
    assert sum(parts.values()) == 214.0


def test_the_account_is_cut_in_the_middle_where_no_point_was_taken() -> None:
    points = [(0, {"starting": 10.0}), (20, seconds(starting=10.0, computing=40.0))]
    assert seconds_at(points, 5)["computing"] == 10.0
    assert seconds_at(points, 0) == {"starting": 10.0}
    assert seconds_at(points, 99) == points[1][1]
    failed = Attempt(1, 1000.0, 0, points, accounted_unix=1050.0, result="failed", ended_unix=1050.0)
    assert split([failed], 1050.0, 5) == dict.fromkeys(PARTS, 0.0) | {"starting": 10.0, "computing": 10.0, "lost": 30.0}


@pytest.mark.parametrize("until", [1041.0, 1045.0])
def test_the_sum_holds_though_clocks_disagree_and_nobody_saw_the_end(until: float) -> None:
    unseen = Attempt(1, 1000.0, 0, KILLED.points, accounted_unix=1042.0)  # its supervisor was killed as well
    for following in (0, 10, 15):
        assert sum(split([unseen], until, following).values()) == pytest.approx(until - 1000.0, abs=0.01)
    never = Attempt(1, 1000.0, ended_unix=1020.0, result="failed")  # it never came to a phase
    assert split([never], until, 0) == dict.fromkeys(PARTS, 0.0) | {"lost": until - 1000.0}


def test_read_back_from_what_a_run_leaves(tmp_path: Path) -> None:
    def line(attempt: int, step: int, from_step: int, unix: float, parts: dict[str, float]) -> str:
        values = {"step": step, "attempt": attempt, "from_step": from_step, "time_unix": unix}
        return json.dumps({**values, "attempt_seconds": parts}) + "\n"

    (tmp_path / "metrics.jsonl").write_text(
        line(1, 10, 0, 1026.0, seconds(starting=10.0, computing=15.0, data=1.0))
        + '{"step": 10, "valid_loss": 1.0}\n'
        + line(1, 10, 0, 1030.0, seconds(starting=10.0, computing=15.0, data=1.0, saving=4.0))
        + line(2, 20, 10, 1080.0, seconds(starting=8.0, computing=20.0, data=1.0, evaluating=1.0, saving=3.0))
        + '{"step": 21, "attempt_seconds": {'
    )
    status = {"attempt": 1, "step": 15, "from_step": 0, "time_unix": 1042.0, "phase": "agree"}
    status["attempt_seconds"] = seconds(starting=10.0, computing=25.0, data=3.0, saving=4.0)
    attempt = tmp_path / "attempts/0001"
    write_json(attempt / "command.json", {"started_unix": 1000.0, "checkpoint_before": None})
    write_json(attempt / "ended.json", {"result": "failed", "ended_unix": 1045.0, "status": status})
    (tmp_path / "attempts/0002").mkdir()  # by a plain script: there is no more than its lines
    first, second = read_attempts(tmp_path, 2)
    assert split([first], 1045.0, 10) == split([KILLED], 1045.0, 10)
    assert (second.started_unix, second.from_step, second.result) == (1047.0, 10, None)
    assert seconds_before(tmp_path, 2, 1047.0, 10) == split([KILLED], 1047.0, 10)
    assert sum(run_seconds(tmp_path, 2000.0, is_running=False).values()) == pytest.approx(80.0)
    assert run_seconds(tmp_path / "nothing", 2000.0, is_running=False) == dict.fromkeys(PARTS, 0.0)


def test_an_attempts_account_has_no_gap(tmp_path: Path) -> None:
    began = time.time() - 5.0
    account = WallTime(began)
    for phase in ("load", "data", "agree", "save:copy", "evaluate", "stopped"):
        account.begin(RankPhase(phase))
        time.sleep(0.02)
    before = time.time() - began
    parts = account.seconds()
    assert before - 0.01 <= sum(parts.values()) <= time.time() - began + 0.01
    assert parts["starting"] > 5.0 and all(parts[part] > 0.015 for part in ATTEMPT_PARTS if part != "starting")
    assert [part_of(RankPhase(phase)) for phase in ("save:vote", "saved", "backward")] == [
        "saving",
        "saving",
        "computing",
    ]
    write_json(tmp_path / "attempts/0007/command.json", {"started_unix": 3.5})
    assert started_unix(tmp_path, 7) == 3.5
    assert 0 < time.time() - started_unix(tmp_path, 8) < 3600  # this process is not older
