"""One plan, three transports: what a rank is given is the same, whichever way it was started."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_lab import SlurmLab
from ssh_lab import SshLab

from dstrain.supervise.attempt import attempt_plan
from dstrain.transport.command import Cluster, Job
from dstrain.transport.node_script import NodeSettings, node_script
from dstrain.transport.transport import TRANSPORTS
from dstrain.transports.slurm import Slurm

LAUNCH_TESTS = Path(__file__).parents[1] / "launch"
# Of torchrun, for each launch: the store's port and the launch's name.
DIFFERENT_EACH_TIME = ("MASTER_PORT", "TORCHELASTIC_RUN_ID")


def test_a_rank_sees_the_same_through_every_transport(
    slurm_lab: SlurmLab, ssh_lab: SshLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"WORDS": 'a\'; touch x "$HOME"\nünï', "PYTHONPATH": str(LAUNCH_TESTS), "OMP_NUM_THREADS": "1"}
    settings = NodeSettings(tmp_path, sys.executable, words, {"SOME_API_KEY": "sk-123"})
    monkeypatch.setenv("NOBODY_NAMED_THIS", "1")
    seen = {}
    for way, host, environment in (
        ("local", "127.0.0.1", {}),
        ("openssh", "node1", {}),
        ("pdsh", "node1", {"TMPDIR": str(tmp_path)}),
        ("slurm", "node1", slurm_lab.env | {"SLURM_JOB_NODELIST": "node1"}),
    ):
        run_dir = tmp_path / "run"
        is_ssh = way in ("openssh", "pdsh")
        section = Slurm() if way == "slurm" else None
        cluster = Cluster("ssh" if way == "openssh" else way, (host,), settings, 29_500, section=section)
        job = Job("tiny", run_dir, 2, shutdown_timeout_seconds=5, entry="stand_in:show_rank", cluster=cluster)
        (channel,) = TRANSPORTS[cluster.transport].channels(cluster)
        # as a dry run shows it
        shell = ["bash", "-c", channel.as_shell(node_script(attempt_plan(job, cluster, 1, settings.passed)))]
        done = subprocess.run(
            ssh_lab.entering("ctl", shell) if is_ssh else shell,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        logs = [log.read_text() for log in tmp_path.glob("tmp.*/*.log")]
        assert (run_dir / "seen-1.json").exists(), f"{way}: {done.stdout}{done.stderr}{logs}"
        seen[way] = [json.loads((run_dir / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
        shutil.rmtree(run_dir)
    for ranks in seen.values():
        for rank in ranks:
            assert rank["environment"]["WORDS"] == words["WORDS"]
            assert rank["environment"]["SOME_API_KEY"] == "sk-123"
            assert "NOBODY_NAMED_THIS" not in rank["environment"]
            for name in DIFFERENT_EACH_TIME:
                rank["environment"].pop(name, None)
            rank["argv"][rank["argv"].index("--parent-pid") + 1] = "PID"
    for way in ("openssh", "pdsh", "slurm"):
        for here, there in zip(seen["local"], seen[way], strict=True):
            assert sorted(there["environment"].items() ^ here["environment"].items()) == []
            assert (there["argv"], there["cwd"]) == (here["argv"], here["cwd"])
    assert not (tmp_path / "x").exists()
