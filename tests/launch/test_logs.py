"""`dstrain logs`: every line after its rank, or only what went wrong; and what comes, over attempts."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.cli import main
from dstrain.observe.logs import Errors
from dstrain.rundir.run_folder import exclusive

LOG = """\
12:00:01 saved checkpoints/step-0000000010
node7 UserWarning: a backend is slow
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    step()

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in step
NotFinite: the loss
12:00:02 step 11
Fatal Python error: Segmentation fault

Thread 0x00007f (most recent call first):
  File "c.py", line 3 in wait
12:00:03 step 12
[rank0]: ncclSystemError: connection refused
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    return folder


def write(run_dir: Path, attempt: int, name: str, text: str) -> None:
    file = run_dir / f"attempts/{attempt:04d}/logs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as log:
        log.write(text)


def test_errors_are_stacks_as_a_whole_and_lines_that_say_so() -> None:
    errors = Errors()
    shown = [line for line in LOG.splitlines() if errors.wants(line)]
    dropped = [line for line in LOG.splitlines() if line and line not in shown]
    assert dropped == ["12:00:01 saved checkpoints/step-0000000010", "12:00:02 step 11", "12:00:03 step 12"]


def test_logs_of_an_attempt(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(run_dir)]) == 2
    write(run_dir, 1, "n1/rank-00000.log", "old\n")
    write(run_dir, 2, "n1/rank-00000.log", "fine\nValueError: no")
    write(run_dir, 2, "n2/rank-00001.log", "well\n")
    write(run_dir, 2, "n2/launcher.log", "agent's\n")
    capsys.readouterr()
    assert main(["logs", str(run_dir)]) == 0
    assert capsys.readouterr().out == "n2 agent | agent's\nrank 0 | fine\nrank 0 | ValueError: no\nrank 1 | well\n"
    assert main(["logs", str(run_dir), "--rank", "0", "--errors"]) == 0
    assert capsys.readouterr().out == "rank 0 | ValueError: no\n"
    assert main(["logs", str(run_dir), "--attempt", "1"]) == 0
    assert capsys.readouterr().out == "rank 0 | old\n"
    assert main(["logs", str(run_dir), "--attempt", "3"]) == main(["logs", str(run_dir), "--rank", "7"]) == 2
    said = capsys.readouterr().err
    assert "has no attempt 3; the newest one is 2" in said and "has no log of rank 7" in said


@pytest.mark.slow
def test_follow_goes_on_with_the_next_attempt_and_ends_with_the_run(run_dir: Path) -> None:
    words = [sys.executable, "-m", "dstrain", "logs", str(run_dir), "--follow"]
    with exclusive(run_dir):
        write(run_dir, 1, "n1/rank-00000.log", "first\nhalf")
        follower = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert follower.stdout is not None and follower.stdout.readline() == "rank 0 | first\n"
        write(run_dir, 1, "n1/rank-00000.log", " a line\n")
        assert follower.stdout.readline() == "rank 0 | half a line\n"
        write(run_dir, 2, "n1/rank-00000.log", "second\n")
        assert [follower.stdout.readline() for _ in range(2)] == ["--- attempt 2\n", "rank 0 | second\n"]
        write(run_dir, 2, "n1/rank-00000.log", "last words")
        time.sleep(0.5)
        assert follower.poll() is None
    rest, _ = follower.communicate(timeout=60)
    assert rest == "rank 0 | last words\n" and follower.returncode == 0
