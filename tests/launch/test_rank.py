"""One rank as a program, without a supervisor."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def rank(run_dir: Path, actions: list[str], *words: str, number: str | None = "0") -> subprocess.Popen[str]:
    (run_dir / "script.json").write_text(json.dumps({"1": {"0": actions}}))
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.Popen(
        [sys.executable, "-m", "dstrain.rank", "--run-dir", str(run_dir), "--attempt", "1", *words],
        env={**environment, "PYTHONPATH": str(HERE)} | ({} if number is None else {"RANK": number}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


STAND_IN = ("--entry", "stand_in:run_rank")


def log(run_dir: Path) -> str:
    (file,) = run_dir.glob("attempts/0001/logs/*/rank-00000.log")
    return file.read_text()


def test_its_last_words_hold_what_a_verdict_needs(tmp_path: Path) -> None:
    process = rank(tmp_path, ["step 7", "error boom"], *STAND_IN)
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == 1
    error = json.loads((tmp_path / "attempts/0001/errors/rank-00000.json").read_text())
    assert (error["kind"], error["type"], error["message"]) == ("exception", "RuntimeError", "boom")
    assert (error["rank"], error["step"], error["phase"]) == (0, 7, "forward")
    assert abs(error["time_unix"] - time.time()) < 60
    assert "stand_in.py" in error["traceback"]
    assert log(tmp_path).endswith("RuntimeError: boom\n")


def test_a_users_error_is_2(tmp_path: Path) -> None:
    process = rank(tmp_path, ["user-error no such shard"], *STAND_IN)
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert json.loads((tmp_path / "attempts/0001/errors/rank-00000.json").read_text())["kind"] == "user"


def test_in_a_terminal_it_prints_there(tmp_path: Path) -> None:
    process = rank(tmp_path, ["print hello"], *STAND_IN, "--terminal")
    assert process.communicate(timeout=120)[0] == "hello\n"
    assert process.returncode == 0
    assert not (tmp_path / "attempts/0001/logs").exists()


def test_sigusr2_prints_the_stacks_and_it_goes_on(tmp_path: Path) -> None:
    process = rank(tmp_path, ["catch-stop", "ready", "wait"], *STAND_IN)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    while "in run_rank" not in log(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads((tmp_path / "attempts/0001/outcome.json").read_text())["outcome"] == "stopped"


def test_without_a_rank_it_says_how_ranks_are_started(tmp_path: Path) -> None:
    output, _ = rank(tmp_path, [], number=None).communicate(timeout=120)
    assert "RANK is not set: start ranks through `dstrain run` or torchrun" in output
    assert "Traceback" not in output


def test_its_own_module_imports_nothing_heavy() -> None:
    code = "import sys, dstrain.rank; print([m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
