"""A transport in one file of another package: profile, dry run, doctor, a run on two nodes, kill, stop, resume."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from extension_package import Extension, InstallExtension, documented_file

from dstrain.base.processes import end_marked
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.ranks
DEADLINE_SECONDS = 400
PROFILE = """\
transport: sessions
nodes: 2
procs_per_node: 1
sessions: {{count: 2}}
network: {{interface: {interface}}}
environment: {{PYTHONPATH: "{python_path}", OMP_NUM_THREADS: "1"}}
"""


def interface() -> str:
    """A network device that is up and not the loopback: the preflight refuses that for several nodes."""
    states = {name: Path(f"/sys/class/net/{name}/operstate") for _, name in socket.if_nameindex() if name != "lo"}
    return next(name for name, state in states.items() if state.read_text().strip() == "up")


@pytest.fixture
def extension(install_extension: InstallExtension, tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> Extension:
    """The package of docs/extending.md, and beside it a recipe that lasts and a profile."""
    extension = install_extension(
        {"dstrain_sessions": documented_file("dstrain_sessions.py")},
        {"dstrain.transports": {"sessions": "dstrain_sessions:TRANSPORT"}},
    )
    recipe = tiny_recipe("train.steps=1000000", "checkpoint.every_steps=10", "log.every_steps=5")
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(recipe))
    profile = PROFILE.format(interface=interface(), python_path=extension.environment["PYTHONPATH"])
    (tmp_path / "two.yaml").write_text(profile)
    return extension


def wait_until(process: "subprocess.Popen[bytes]", log: Path, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_mistakes_of_the_section_are_told_with_their_places(extension: Extension, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "transport: sessions\nsessions:\n  cont: 2\n  count: 0\n  first_address: 10.0.0.1\nhosts: {file: a}\n"
    )
    told = extension.dstrain("run", "tiny.yaml", "--on", "bad.yaml", cwd=tmp_path, exit_code=2)
    assert "bad.yaml:3: sessions.cont is an unknown key; did you mean sessions.count?" in told
    assert "bad.yaml:4: sessions.count=0 must be more than 0; change the value" in told
    assert "bad.yaml:5: sessions.first_address=10.0.0.1 is not of the loopback network; write 127.0.0.2" in told
    assert "bad.yaml:6: hosts is for transport: pdsh or ssh, and this is sessions; delete it" in told


def test_dry_run_and_doctor(extension: Extension, tmp_path: Path) -> None:
    shown = extension.dstrain("run", "tiny.yaml", "--on", "two.yaml", "--dry-run", cwd=tmp_path)
    assert "# 2 ranks × " in shown and "# node 1: 127.0.0.3" in shown and "| setsid --wait bash -c " in shown
    result = json.loads(extension.dstrain("doctor", "tiny.yaml", "--on", "two.yaml", "--quick", "--json", cwd=tmp_path))
    assert not [finding for finding in result["findings"] if finding["level"] == "error"]
    assert {"127.0.0.2", "127.0.0.3"} <= set(json.dumps(result).split('"'))


def test_a_run_on_two_nodes_goes_on_after_a_kill_and_stops(extension: Extension, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "runs/tiny", tmp_path / "run.log"
    command = [sys.executable, "-m", "dstrain", "run", "tiny.yaml", "--on", "two.yaml"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=extension.environment, stdout=output, stderr=output)
    try:
        wait_until(process, log, (run_dir / "checkpoints/step-0000000010/manifest.json").exists)
        assert json.loads((run_dir / "run.json").read_text())["transport"] == "sessions"
        killed = json.loads((run_dir / "attempts/0001/ranks/rank-00001.json").read_text())["pid"]
        os.kill(killed, signal.SIGKILL)
        wait_until(process, log, (run_dir / "attempts/0002/ranks/rank-00001.json").exists)
        verdict = json.loads((run_dir / "attempts/0001/verdict.json").read_text())
        assert verdict["first"]["rank"] == 1 and verdict["decision"] == "restart"
        began = json.loads((run_dir / "attempts/0002/command.json").read_text())
        resumed_at = began["checkpoint_before"]
        assert resumed_at >= 10 and [arguments[0] for arguments in began["commands"]] == ["setsid", "setsid"]
        wait_until(process, log, lambda: newest_step(run_dir) > resumed_at)
        assert "saved at step " in extension.dstrain("stop", "runs/tiny", cwd=tmp_path)
        assert process.wait(timeout=DEADLINE_SECONDS) == 75, log.read_text()
        shown = extension.dstrain(*command[3:], "--dry-run", cwd=tmp_path)
        assert f"attempt 3, newest checkpoint at step {newest_step(run_dir):,}" in shown
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for attempt in (run_dir / "attempts").glob("*"):
            end_marked(attempt)


def newest_step(run_dir: Path) -> int:
    """That of the newest checkpoint."""
    return max(int(folder.name.removeprefix("step-")) for folder in (run_dir / "checkpoints").glob("step-*"))
