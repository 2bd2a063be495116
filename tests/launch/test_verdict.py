import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.base.phases import RankPhase
from dstrain.diagnose.causes import explain
from dstrain.diagnose.failure import Hang, RankFailure
from dstrain.diagnose.verdict import VERDICT_FILE, PastFailure, Verdict, decide, first_failure, signature
from dstrain.diagnose.verdict_text import verdict_line, verdict_text
from dstrain.errors import UserError

KILLED = RankFailure(1, "node7", -signal.SIGKILL, 100.0, step=120, log="runs/a/attempts/0001/logs/node7/rank-00001.log")
LOST_PEER = RankFailure(
    0,
    "node7",
    1,
    99.5,
    "exception",
    "RuntimeError",
    "[gloo] Connection closed by peer [10.0.0.2]:4711",
    RankPhase.FORWARD,
    120,
)
ENDED_BY_AGENT = RankFailure(2, "node7", -signal.SIGTERM, 99.0)
ERROR = RankFailure(3, "node8", 1, 101.0, "exception", "ValueError", "loss is nan", RankPhase.BACKWARD, 121)
USER = RankFailure(0, "node7", 2, 100.0, "user", "CorpusError", "shard-3.tar: Connection refused is its text")

PROGRESS = PastFailure(True, None)
NONE = PastFailure(False, None)


def verdict_of(failures: list[RankFailure], oom_kills: int | None = 0, past: int = 1) -> Verdict:
    first, others = first_failure(failures)
    decision, reason = decide(first, [PastFailure(False, signature(first))] * past, 3)
    return Verdict(1, first, others, *explain(first, oom_kills), decision, reason)


def test_a_consequence_is_never_the_first_failure_however_early_it_was_noticed() -> None:
    assert first_failure([LOST_PEER, ENDED_BY_AGENT, KILLED]) == (KILLED, (ENDED_BY_AGENT, LOST_PEER))
    assert first_failure([ENDED_BY_AGENT, ERROR, KILLED])[0] is KILLED


def test_among_consequences_alone_the_earliest_is_the_first() -> None:
    assert first_failure([LOST_PEER, ENDED_BY_AGENT])[0] is ENDED_BY_AGENT


@pytest.mark.parametrize(
    "message",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:36301",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Read error [127.0.0.1]:1: Connection reset by peer",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
        "[c10d] recvValue failed on SocketImpl(fd=3, addr=[localhost]:50000): Connection was likely closed",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 ms",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_lost_connections_in_the_words_of_each_library_are_consequences(message: str) -> None:
    assert RankFailure(0, "a", 1, 1.0, "exception", "RuntimeError", message).is_consequence
    aborted = RankFailure(0, "a", -signal.SIGABRT, 1.0, log_tail=("terminate called", message))
    assert aborted.is_consequence


def test_hosts_are_compared_by_the_supervisors_monotonic_clock_not_by_their_own() -> None:
    late = replace(ERROR, rank=0, time_unix=50.0, monotonic=8.0)  # its host's wall clock is slow
    early = replace(ERROR, rank=1, time_unix=99.0, monotonic=7.0)
    assert first_failure([late, early])[0] is early
    assert first_failure([late, replace(early, monotonic=None)])[0] is late  # not known of all: wall clocks have to do


def test_whoever_reports_anothers_failure_is_a_consequence_of_it() -> None:
    full = RankFailure(1, "node7", 2, 101.0, "user", "CheckpointError", "rank 1 of 2: no space left", blames_rank=1)
    told = replace(full, rank=0, time_unix=100.0)
    assert first_failure([told, full]) == (full, (told,))
    assert verdict_of([told, full]).cause == "the disk is full"


def test_a_lost_node_is_left_out_where_enough_are_left() -> None:
    lost = RankFailure(None, "node2", 255, 100.0)
    decision, reason = decide(lost, [NONE], 3, ["node1", "node3"])
    assert decision == "restart without the node"
    assert reason == "node2 is left out, node1, node3 remain; 1 of 3 since the newest checkpoint"
    assert decide(lost, [NONE], 3)[0] == "restart"  # none can be spared
    assert decide(lost, [NONE], 0, ["node1"])[0] == "give up"
    assert decide(KILLED, [NONE], 3, ["node1"])[0] == "restart"  # a rank, not its node


def test_a_hang_ends_the_run_only_where_the_profile_says_so() -> None:
    hang = replace(KILLED, hang=Hang(RankPhase.FORWARD, 60.0, is_stopped=False))
    assert decide(hang, [NONE], 3)[0] == "restart"
    assert decide(hang, [NONE], 3, on_hang="stop") == ("give up", "the profile says on_hang: stop")
    assert decide(KILLED, [NONE], 3, on_hang="stop")[0] == "restart"


def test_a_broken_installation_is_not_tried_again() -> None:
    missing = RankFailure(0, "a", 1, 1.0, "exception", "ModuleNotFoundError", "No module named 'apex'")
    assert decide(missing, [NONE], 3) == ("give up", "every restart would meet it again")


def test_a_user_error_is_a_cause_whatever_it_says() -> None:
    assert not USER.is_consequence
    assert verdict_of([LOST_PEER, USER]).decision == "user error"


def test_text_of_a_killed_rank() -> None:
    tail = ("step 119", "step 120")
    killed = RankFailure(
        1, "node7", -9, 100.0, step=1120, log="runs/a/attempts/0001/logs/node7/rank-00001.log", log_tail=tail
    )
    assert (
        verdict_text(verdict_of([LOST_PEER, killed, ENDED_BY_AGENT], oom_kills=1))
        == """\
attempt 1: rank 1 on node7 failed first at step 1,120
  what      killed by SIGKILL
  cause     the kernel's out-of-memory killer: the machine or its control group ran out of host memory
  remedy    lower train.micro_batch_rows, start fewer ranks on the node, or raise its memory limit
  log       runs/a/attempts/0001/logs/node7/rank-00001.log
            | step 119
            | step 120
  after it  rank 2 on node7: killed by SIGTERM (and 1 more)
  decision  restart: 1 of 3 since the newest checkpoint"""
    )


def test_text_of_an_error_that_came_twice() -> None:
    assert (
        verdict_text(verdict_of([ERROR], past=2))
        == """\
attempt 1: rank 3 on node8 failed first at step 121, phase backward
  what      ValueError: loss is nan
  decision  give up: the same error came twice at the same step, a restart would meet it again"""
    )


def test_json_is_json_and_holds_everything() -> None:
    content = json.loads(json.dumps(verdict_of([KILLED, LOST_PEER]).as_json()))
    assert content["first"]["rank"] == 1
    assert content["first"]["exit_code"] == -9
    assert content["consequences"][0]["message"] == LOST_PEER.message
    assert content["decision"] == "restart"


def test_a_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    hang = Hang(RankPhase.SAVE_VOTE, 60.0, is_stopped=False, step=7, stack=("wait (store.py:1)",))
    verdict = verdict_of([replace(KILLED, hang=hang, log_tail=("step 7",)), LOST_PEER])
    (tmp_path / VERDICT_FILE).write_text(json.dumps(verdict.as_json()))
    assert Verdict.read(tmp_path) == verdict
    assert verdict_line(verdict).startswith("rank 1 on node7: it hangs, and the other ranks waited for it; restart: 1")
    assert Verdict.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"rank": 1', '"rank": -1', "first.rank: Input should be greater than or equal to 0"),
        ('"rank": 1', '"rank": "one"', "first.rank: Input should be a valid integer"),
        ('"decision": "restart"', '"decision": "hope"', "decision: Input should be 'restart'"),
        ('"cause":', '"because":', "cause: Field required"),
        ('"attempt": 1', '"attempt": 1,', None),
    ],
)
def test_a_damaged_verdict_is_one_error_that_names_file_and_key(
    tmp_path: Path, old: str, new: str, problem: str | None
) -> None:
    written = json.dumps(verdict_of([KILLED]).as_json())
    assert old in written
    (tmp_path / VERDICT_FILE).write_text(written.replace(old, new, 1))
    with pytest.raises(UserError) as raised:
        Verdict.read(tmp_path)
    assert str(tmp_path / VERDICT_FILE) in str(raised.value)
    assert problem is None or problem in str(raised.value)


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (RankFailure(0, "a", 1, 1.0, "exception", "OutOfMemoryError", "CUDA out of memory. Tried…"), "device ran out"),
        (RankFailure(0, "a", 1, 1.0, "exception", "OSError", "[Errno 28] No space left on device"), "disk is full"),
        (
            RankFailure(0, "a", 1, 1.0, "exception", "ModuleNotFoundError", "No module named 'apex'"),
            "package is missing",
        ),
        (RankFailure(0, "a", 1, 1.0, "exception", "RuntimeError", "EADDRINUSE, Address already in use"), "port"),
        (
            RankFailure(0, "a", 1, 1.0, "exception", "RuntimeError", "Timed out waiting 10ms for recv"),
            "waited too long",
        ),
        (LOST_PEER, "lost the connection"),
        (RankFailure(0, "a", -signal.SIGBUS, 1.0), "/dev/shm"),
        (
            RankFailure(0, "a", -signal.SIGSEGV, 1.0, log_tail=("Fatal Python error: Segmentation fault",)),
            "native code",
        ),
        (RankFailure(0, "a", -signal.SIGKILL, 1.0), "SIGKILL"),
    ],
)
def test_known_causes_have_a_remedy(failure: RankFailure, cause: str) -> None:
    found, remedy = explain(failure, 0)
    assert cause in found
    assert remedy


def test_an_unknown_failure_is_left_to_its_own_words() -> None:
    assert explain(ERROR, 5) == ("", "")


def test_sigkill_is_blamed_on_memory_only_where_the_kernel_counted_it() -> None:
    assert "out-of-memory killer:" in explain(KILLED, 1)[0]
    assert explain(KILLED, 0)[0] == "something outside the run sent SIGKILL"
    assert "perhaps" in explain(KILLED, None)[0]
    assert "out-of-memory killer:" in explain(replace(KILLED, out_of_memory=True), None)[0]
    reader = RankFailure(0, "a", 1, 1.0, "exception", "DataProcessError", "it died", data_process_exit_code=-9)
    assert "out-of-memory killer:" in explain(reader, 1)[0]


@pytest.mark.parametrize(
    ("past", "max_restarts", "expected"),
    [
        ([NONE], 3, "restart"),
        ([NONE] * 3, 3, "restart"),
        ([NONE] * 4, 3, "give up"),
        ([NONE], 0, "give up"),
        ([PROGRESS] * 50, 1, "restart"),  # it gets further each time
        ([PROGRESS, NONE], 1, "give up"),
        ([NONE, NONE, NONE, PROGRESS, NONE, NONE], 3, "restart"),
        ([NONE, NONE, NONE, PROGRESS, NONE, NONE, NONE], 3, "give up"),
    ],
)
def test_restarts_are_counted_since_the_newest_checkpoint(
    past: list[PastFailure], max_restarts: int, expected: str
) -> None:
    assert decide(KILLED, past, max_restarts)[0] == expected


def test_the_same_exception_at_the_same_step_twice_is_not_tried_a_third_time() -> None:
    same, other = PastFailure(False, signature(ERROR)), PastFailure(False, ("ValueError", "loss is nan", 7))
    assert decide(ERROR, [same, same], 3)[0] == "give up"
    assert decide(ERROR, [other, same], 3)[0] == "restart"
    assert decide(ERROR, [same, PastFailure(True, signature(ERROR))], 3)[0] == "restart"


def test_a_signal_or_a_lost_connection_may_come_again_by_chance() -> None:
    assert signature(KILLED) is None
    assert signature(LOST_PEER) is None
    assert signature(ERROR) == ("ValueError", "loss is nan", 121)
