"""Real processes, signals and the real elastic agent; only the training in the ranks is a stand-in (stand_in.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.code_digest import PACKAGE
from dstrain.base.processes import ATTEMPT_MARK, end_marked, marked_processes
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.ranks

HERE = Path(__file__).parent
Script = dict[str, dict[str, list[str]]]


class Supervisor:
    """`stand_in.py` at work on a folder."""

    def __init__(
        self,
        run_dir: Path,
        script: Script,
        ranks: int = 1,
        max_restarts: int = 3,
        *words: str,
        code: Path = PACKAGE.parent,
    ) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(exist_ok=True)
        (run_dir / "script.json").write_text(json.dumps(script))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "stand_in.py"), str(run_dir), str(ranks), str(max_restarts), *words],
            env={**os.environ, "PYTHONPATH": f"{HERE}:{code}", "SOME_API_KEY": "sk-123"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests run under nohup, too
        )

    def end(self, timeout_seconds: float = 120.0) -> tuple[int, str]:
        """Its exit code and what it printed."""
        output, _ = self.process.communicate(timeout=timeout_seconds)
        return self.process.returncode, output

    def wait_until(self, condition: Callable[[], object], timeout_seconds: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def wait_until_ready(self, ranks: int) -> None:
        self.wait_until(lambda: all((self.run_dir / f"ready-{rank}").exists() for rank in range(ranks)))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    """Starts supervisors on `tmp_path/run`; ends them and checks that nothing of any attempt is left."""
    started: list[Supervisor] = []

    def start(script: Script, ranks: int = 1, max_restarts: int = 3, *words: str, **options: Path) -> Supervisor:
        started.append(Supervisor(tmp_path / "run", script, ranks, max_restarts, *words, **options))
        return started[-1]

    yield start
    for supervisor in started:
        if supervisor.process.poll() is None:
            supervisor.process.kill()
            supervisor.process.communicate()
    left = [pid for attempt in attempts(tmp_path / "run") for pid in marked_processes(attempt)]
    for attempt in attempts(tmp_path / "run"):
        end_marked(attempt)
    assert left == []


def attempts(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "attempts").glob("*"))


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_done_is_0_and_everything_of_the_attempt_is_on_record(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = start({"1": {"0": ["print hello", "step 3", "checkpoint 3"]}})
    code, output = supervisor.end()
    assert code == 0, output
    attempt = tmp_path / "run" / "attempts" / "0001"
    assert read(attempt / "outcome.json") == {"outcome": "done", "step": 3}
    (log,) = attempt.glob("logs/*/rank-00000.log")
    assert log.read_text() == "hello\n"
    assert read(attempt / "ranks" / "rank-00000.json")["rank"] == 0
    command = read(attempt / "command.json")
    assert "SOME_API_KEY" not in command["environment"]
    assert "PATH" in command["environment"]
    assert command["environment"][ATTEMPT_MARK] == str(attempt.resolve())
    assert "sk-123" not in (attempt / "command.json").read_text()
    assert output.splitlines()[0] == f"tiny: attempt 1, 1 rank, no checkpoint yet; logs in {attempt}/logs"
    assert output.splitlines()[-1] == f"tiny: done; everything is in {tmp_path}/run"


def test_a_users_error_is_2_shown_once_and_not_tried_again(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    mistake = "user-error train-0007.tar is not there; build it"
    code, output = start({"1": {"0": [mistake], "1": [mistake]}}, ranks=2).end()
    assert code == 2
    assert output.count("train-0007.tar is not there; build it") == 1
    assert output.endswith("error: train-0007.tar is not there; build it\n")
    assert "Traceback" not in output
    assert read(tmp_path / "run/attempts/0001/verdict.json")["decision"] == "user error"
    assert len(attempts(tmp_path / "run")) == 1


def test_restarts_while_there_is_progress_and_gives_up_without(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    script = {
        "1": {"0": ["checkpoint 1", "kill SIGKILL"]},
        "2": {"0": ["checkpoint 2", "kill SIGKILL"]},
        "3": {"0": ["checkpoint 3", "kill SIGKILL"]},
        "4": {"0": ["kill SIGKILL"]},
        "5": {"0": ["never reached"]},
    }
    code, output = start(script, max_restarts=1).end()
    assert code == 1
    decisions = [read(attempt / "verdict.json")["decision"] for attempt in attempts(tmp_path / "run")]
    assert decisions == ["restart", "restart", "restart", "give up"]
    assert "rank 0 on" in output and "killed by SIGKILL" in output
    assert "--max-restarts=1, and none of these restarts brought a newer checkpoint" in output


def test_code_that_changed_between_attempts_is_not_run_in_the_same_run(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "code" / "dstrain")
    changed = tmp_path / "code/dstrain/tasks/new.py"
    script = {"1": {"0": ["checkpoint 1", f"change-code {changed}", "kill SIGKILL"]}, "2": {"0": ["print again"]}}
    code, output = start(script, code=tmp_path / "code").end()
    assert code == 2
    words = "the same command goes on with the code of now, newest checkpoint at step 1"
    assert output.splitlines()[-1].startswith(f"error: {tmp_path}/code/dstrain was changed while tiny ran")
    assert output.endswith(f"{words}\n") and "Traceback" not in output
    code, output = start(script, code=tmp_path / "code").end()
    assert code == 0, output


def test_the_same_error_twice_is_enough(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    code, output = start({str(attempt): {"0": ["step 7", "error boom"]} for attempt in range(1, 9)}).end()
    assert code == 1
    assert len(attempts(tmp_path / "run")) == 2
    assert "RuntimeError: boom" in output
    assert "| RuntimeError: boom" in output  # the log's tail
    assert "the same error came twice at the same step" in output


def test_a_killed_rank_is_named_first_though_its_peer_reports_sooner_and_the_run_goes_on(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    script = {
        # as in training, a rank that is told to stop still says what it has met
        "1": {"0": ["catch-stop", "step 4", "checkpoint 4", "background", "listen"], "1": ["connect", "kill SIGKILL"]},
        "2": {"0": ["step 5"], "1": []},
    }
    code, output = start(script, ranks=2).end()
    assert code == 0, output
    verdict = read(tmp_path / "run/attempts/0001/verdict.json")
    assert (verdict["first"]["rank"], verdict["first"]["exit_code"]) == (1, -9)
    assert [(f["rank"], f["error_type"]) for f in verdict["consequences"]] == [(0, "RuntimeError")]
    assert "attempt 1: rank 1 on" in output
    assert "tiny: attempt 2, 2 ranks, newest checkpoint at step 4" in output


def test_a_rank_that_is_killed_while_its_peers_still_start_is_a_failure_not_a_stop(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    code, output = start({"1": {"0": ["wait"], "1": ["kill SIGKILL"]}, "2": {}}, ranks=2).end()
    assert code == 0, output
    assert read(tmp_path / "run/attempts/0001/verdict.json")["first"]["rank"] == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_stop_reaches_the_rank_as_sigterm_and_is_75(
    start: Callable[..., Supervisor], tmp_path: Path, stop: int
) -> None:
    supervisor = start({"1": {"0": ["catch-stop", "ready", "wait", "checkpoint 9"]}})
    supervisor.wait_until_ready(1)
    supervisor.process.send_signal(stop)
    code, output = supervisor.end()
    assert code == 75, output
    assert read(tmp_path / "run/attempts/0001/outcome.json")["outcome"] == "stopped"
    assert "tiny: stopped, newest checkpoint at step 9; the same command goes on from there" in output
    assert len(attempts(tmp_path / "run")) == 1


def test_a_stop_reaches_every_rank_through_the_agent(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    waiting = ["catch-stop", "ready", "wait"]
    supervisor = start({"1": {"0": [*waiting, "checkpoint 9"], "1": waiting}}, ranks=2)
    supervisor.wait_until_ready(2)
    supervisor.process.terminate()
    code, output = supervisor.end()
    assert code == 75, output
    assert read(tmp_path / "run/attempts/0001/agents/node-00000.json")["signal"] == "SIGTERM"
    assert read(tmp_path / "run/attempts/0001/agents/node-00000.json")["failures"] == []


def test_a_stop_before_the_training_listens_is_75_as_well(start: Callable[..., Supervisor]) -> None:
    supervisor = start({"1": {"0": ["ready", "wait"]}})  # never installs a handler of its own
    supervisor.wait_until_ready(1)
    supervisor.process.terminate()
    assert supervisor.end()[0] == 75


def test_a_stop_that_finds_the_agent_still_importing_is_75(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = start({"1": {"0": ["wait"], "1": ["wait"]}}, ranks=2)
    supervisor.wait_until(lambda: any(marked_processes(attempt) for attempt in attempts(tmp_path / "run")))
    supervisor.process.terminate()
    code, output = supervisor.end()
    assert code == 75, output


def test_a_failure_while_stopping_is_1_and_not_tried_again(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = start({"1": {"0": ["catch-stop", "ready", "wait", "error [Errno 28] No space left on device"]}})
    supervisor.wait_until_ready(1)
    supervisor.process.terminate()
    code, output = supervisor.end()
    assert code == 1
    assert "the disk is full" in output
    assert "give up: it failed while it was being stopped" in output
    assert len(attempts(tmp_path / "run")) == 1


def test_ranks_that_do_not_stop_in_time_are_killed_and_that_is_1(start: Callable[..., Supervisor]) -> None:
    supervisor = start({"1": {"0": ["ignore-stop", "ready", "wait"], "1": ["ignore-stop", "ready", "wait"]}}, ranks=2)
    supervisor.wait_until_ready(2)
    supervisor.process.terminate()
    code, output = supervisor.end()
    assert code == 1, output
    assert "did not stop within 5 s of being asked to and was killed" in output


def test_ctrl_c_twice_kills_at_once(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    waiting = ["background", "ignore-stop", "ready", "wait"]
    supervisor = start({"1": {"0": waiting, "1": waiting}}, ranks=2)
    supervisor.wait_until_ready(2)
    # the agent, two ranks, two of their own
    supervisor.wait_until(lambda: len(marked_processes(tmp_path / "run/attempts/0001")) == 5)
    supervisor.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert supervisor.process.poll() is None
    supervisor.process.send_signal(signal.SIGINT)
    code, output = supervisor.end()
    assert code == 130, output
    assert marked_processes(tmp_path / "run/attempts/0001") == []


def test_nothing_outlives_a_supervisor_that_is_killed(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = start({"1": {"0": ["ignore-stop", "ready", "wait"], "1": ["ignore-stop", "ready", "wait"]}}, ranks=2)
    supervisor.wait_until_ready(2)
    attempt = tmp_path / "run/attempts/0001"
    supervisor.wait_until(lambda: len(marked_processes(attempt)) == 3)
    supervisor.process.kill()
    supervisor.process.wait()
    deadline = time.monotonic() + 60
    while marked_processes(attempt) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked_processes(attempt) == []


def test_an_agent_that_is_killed_takes_its_ranks_along_and_the_run_goes_on(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    supervisor = start({"1": {"0": ["ready", "wait"], "1": ["ready", "wait"]}, "2": {}}, ranks=2)
    supervisor.wait_until_ready(2)
    attempt = tmp_path / "run/attempts/0001"
    ranks = {read(file)["pid"] for file in attempt.glob("ranks/*.json")}
    (agent,) = set(marked_processes(attempt)) - ranks
    os.kill(agent, signal.SIGKILL)
    code, output = supervisor.end()
    assert code == 0, output
    assert "attempt 1: the launcher on" in output


def test_a_folder_in_use_is_refused(start: Callable[..., Supervisor]) -> None:
    first = start({"1": {"0": ["catch-stop", "ready", "wait"]}})
    first.wait_until_ready(1)
    second = start({"1": {"0": ["catch-stop", "ready", "wait"]}})
    code, output = second.end()
    assert code == 2
    assert f"is in use: process {first.process.pid} runs it already" in output
    first.process.terminate()
    assert first.end()[0] == 75


def test_what_a_killed_supervisor_left_is_ended_before_the_next_attempt(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    (tmp_path / "run/attempts/0001").mkdir(parents=True)
    mark = {ATTEMPT_MARK: str((tmp_path / "run/attempts/0001").resolve())}
    orphan = subprocess.Popen(["sleep", "60"], env={**os.environ, **mark}, start_new_session=True)
    code, output = start({"2": {}}).end()
    assert orphan.wait(timeout=30) == -signal.SIGKILL
    assert code == 0, output


def test_with_a_profile_it_restarts_and_stops_in_the_same_way(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    waiting = ["catch-stop", "ready", "wait"]
    script = {"1": {"0": ["step 4", "listen"], "1": ["connect", "kill SIGKILL"]}, "2": {"0": waiting, "1": waiting}}
    supervisor = start(script, 2, 3, "profile")
    supervisor.wait_until_ready(2)
    supervisor.process.terminate()
    code, output = supervisor.end()
    assert code == 75, output
    verdict = read(tmp_path / "run/attempts/0001/verdict.json")
    assert (verdict["first"]["rank"], verdict["first"]["host"], verdict["first"]["exit_code"]) == (1, "here", -9)
    assert "tiny: attempt 2, 2 ranks on here" in output


def test_a_lost_node_is_left_to_a_scheduler_that_has_others(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = start({"1": {"0": ["ready", "wait"], "1": ["ready", "wait"]}}, 2, 3, "movable")
    supervisor.wait_until_ready(2)
    attempt = tmp_path / "run/attempts/0001"
    ranks = {read(file)["pid"] for file in attempt.glob("ranks/*.json")}
    (agent,) = set(marked_processes(attempt)) - ranks
    os.kill(agent, signal.SIGKILL)
    code, output = supervisor.end()
    assert code == 75, output
    assert "left to the scheduler, which has other nodes" in output
    assert len(attempts(tmp_path / "run")) == 1


def test_with_a_profile_nothing_outlives_a_supervisor_that_is_killed(
    start: Callable[..., Supervisor], tmp_path: Path
) -> None:
    waiting = ["ignore-stop", "background", "ready", "wait"]
    supervisor = start({"1": {"0": waiting, "1": waiting}}, 2, 3, "profile")
    supervisor.wait_until_ready(2)
    supervisor.process.kill()
    supervisor.process.wait()
    deadline = time.monotonic() + 60
    while marked_processes(tmp_path / "run/attempts/0001") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked_processes(tmp_path / "run/attempts/0001") == []


@pytest.mark.parametrize(("words", "code", "decision"), [([], 0, "restart"), (["on_hang=stop"], 1, "give up")])
def test_a_rank_that_hangs_is_shown_with_its_stack_and_what_follows_is_the_profiles_choice(
    start: Callable[..., Supervisor],
    tmp_path: Path,
    tiny_recipe: Callable[..., Recipe],
    *,
    words: list[str],
    code: int,
    decision: str,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(resolved_yaml(tiny_recipe("hang_timeout_seconds=1")))
    supervisor = start({"1": {"0": ["beat 7", "kill SIGSTOP"]}, "2": {}}, 1, 3, *words)
    ended, output = supervisor.end()
    assert ended == code, output
    verdict = read(tmp_path / "run/attempts/0001/verdict.json")
    assert verdict["decision"] == decision
    assert (verdict["first"]["rank"], verdict["first"]["step"]) == (0, 7)
    assert verdict["first"]["hang"]["stack"][0].startswith("run_rank (")  # where it stopped itself
    assert f"  stack     {verdict['first']['hang']['stack'][0]}\n" in output
    (text,) = (tmp_path / "run/attempts/0001/hangs").glob("*.txt")
    assert "MainThread\n    run_rank (" in text.read_text()
    assert len(attempts(tmp_path / "run")) == (2 if code == 0 else 1)
