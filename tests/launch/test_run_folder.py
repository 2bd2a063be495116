import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.errors import UserError
from dstrain.rundir.run_folder import exclusive, newest_checkpoint_step, next_attempt

HOLD = """
import sys, time
from pathlib import Path
from dstrain.rundir.run_folder import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_attempts_are_numbered_on(tmp_path: Path) -> None:
    assert next_attempt(tmp_path / "new") == 1
    for name in ("0001", "0009", "9999", "10000", "notes", ".tmp"):
        (tmp_path / "attempts" / name).mkdir(parents=True)
    assert next_attempt(tmp_path) == 10001


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    assert newest_checkpoint_step(tmp_path) is None
    for name in ("step-0000000500", "step-0000001000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    for name in ("step-0000002000", ".step-0000003000.staging", "step-0000004000.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-0000004000.tmp" / "manifest.json").touch()
    assert newest_checkpoint_step(tmp_path) == 1000


def test_a_second_holder_is_refused_by_the_first_ones_process_id_until_that_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is in use: process {holder.pid} runs it already"), exclusive(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with exclusive(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_not_inherited(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        child = subprocess.Popen(["sleep", "60"])
    try:
        with exclusive(tmp_path):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
