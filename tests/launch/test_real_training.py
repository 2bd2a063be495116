"""The supervisor around the real training: that the two fit together. Its decisions are tested with a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.processes import ATTEMPT_MARK, end_marked, marked_processes
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> Iterator[Start]:
    """Starts programs in a folder with tiny.yaml, a run that lasts; ends whatever is left of them."""
    recipe = tiny_recipe("train.steps=1000000", "checkpoint.every_steps=10", "log.every_steps=5", "train.zero.stage=1")
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(recipe))
    environment = {**os.environ, "PYTHON": sys.executable, ATTEMPT_MARK: str(tmp_path)}
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(words, cwd=tmp_path, env=environment, **output))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
    for mark in [tmp_path, *(tmp_path / "runs/tiny/attempts").glob("*")]:
        end_marked(mark)
    for process in started:
        process.communicate()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def dstrain(*words: object) -> str:
    command = [sys.executable, "-m", "dstrain", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def ledger_steps(run_dir: Path) -> list[int]:
    file = run_dir / "ledger.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_rank_is_killed_the_run_goes_on_and_a_stop_leaves_a_checkpoint(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/tiny"
    run = (sys.executable, "-m", "dstrain", "run", "tiny.yaml", "--procs-per-node", "2")
    process = start(*run)
    wait_for(process, lambda: (run_dir / "checkpoints/step-0000000010/manifest.json").exists())
    os.kill(read(run_dir / "attempts/0001/ranks/rank-00001.json")["pid"], signal.SIGKILL)
    wait_for(process, lambda: (run_dir / "attempts/0001/verdict.json").exists())
    verdict = read(run_dir / "attempts/0001/verdict.json")
    assert (verdict["first"]["rank"], verdict["first"]["exit_code"], verdict["decision"]) == (1, -9, "restart")

    before = len(ledger_steps(run_dir))
    wait_for(process, lambda: len(ledger_steps(run_dir)) > before + 3)
    node_file = run_dir / "status/nodes/node-00000.json"
    wait_for(process, lambda: all(rank.get("step") for rank in read(node_file)["ranks"]))
    status = json.loads(dstrain("status", run_dir, "--json"))
    assert (status["state"], status["transport"], status["attempts"]) == ("running", "local", 2)
    assert status["supervisor_pid"] == process.pid
    (node,) = status["nodes"]
    assert [rank["rank"] for rank in node["ranks"]] == [0, 1]
    assert {rank["pid"] for rank in node["ranks"]} <= set(marked_processes(run_dir / "attempts/0002"))
    assert status["last_verdict"].startswith(f"rank 1 on {node['host']}: something outside the run sent SIGKILL")
    assert "rank 0 | " in dstrain("logs", run_dir, "--attempt", "1", "--errors")  # which lost its peer
    stopped = dstrain("stop", run_dir)
    code, output = end(process)
    assert code == 75, output
    outcome = read(run_dir / "attempts/0002/outcome.json")
    assert outcome["outcome"] == "stopped"
    stopped_at = outcome["step"]
    assert stopped == f"stopped, and saved at step {stopped_at:,}; the same `dstrain run` goes on from there\n"
    status = json.loads(dstrain("status", run_dir, "--json"))
    assert (status["state"], status["exit_code"], status["checkpoint_step"]) == ("ended", 75, stopped_at)
    assert (run_dir / f"checkpoints/step-{stopped_at:010d}/manifest.json").exists()
    assert marked_processes(run_dir / "attempts/0002") == []

    # It goes on from that very step, here on one rank.
    code, output = end(start(*run[:-2], f"train.steps={stopped_at + 2}"))
    assert code == 0, output
    assert f"newest checkpoint at step {stopped_at:,}" in output
    status = json.loads(dstrain("status", run_dir, "--json"))
    first, last = read(run_dir / "attempts/0001/command.json"), read(run_dir / "attempts/0003/ended.json")
    parts = status["run_seconds"]
    assert sum(parts.values()) == pytest.approx(last["ended_unix"] - first["started_unix"], abs=0.01)
    assert all(parts[part] > 0 for part in ("computing", "data", "saving", "starting", "lost", "paused"))
    assert ledger_steps(run_dir)[-2:] == [stopped_at + 1, stopped_at + 2]
    assert sorted(set(ledger_steps(run_dir))) == list(range(1, stopped_at + 3))


def test_a_mistake_that_only_the_ranks_find_is_2_and_one_message(start: Start, tmp_path: Path) -> None:
    (tmp_path / "no-shards").mkdir()
    code, output = end(start(sys.executable, "-m", "dstrain", "run", "tiny.yaml", f"data.train={tmp_path}/no-shards"))
    assert code == 2, output
    assert output.count("no-shards") == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in output


@pytest.mark.parametrize("words", [["local_debug.sh"], ["single_node.sh", "2"]])
def test_the_plain_scripts_train_and_stop_at_a_checkpoint(start: Start, tmp_path: Path, words: list[str]) -> None:
    run_dir = tmp_path / "runs/tiny"
    process = start(str(ROOT / "launch" / words[0]), *words[1:], "tiny.yaml", "train.steps=500000")
    wait_for(process, lambda: ledger_steps(run_dir))
    code, output = end(start(sys.executable, "-m", "dstrain", "run", "tiny.yaml"))
    assert code == 2
    assert f"is in use: process {process.pid} runs it already" in output
    process.terminate()
    _, output = end(process)
    outcome = read(run_dir / "attempts/0001/outcome.json")
    assert outcome["outcome"] == "stopped", output
    assert (run_dir / f"checkpoints/step-{outcome['step']:010d}/manifest.json").exists()
