"""`dstrain run --on` an ssh profile, through pdsh and OpenSSH, on real daemons: hosts and links that are lost."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster_run import DSTRAIN, SECRET, Project, wait_until
from ssh_lab import SshLab

PROFILE = """\
transport: ssh
nodes: {nodes}
hosts: {{file: hosts.txt, launcher: {launcher}}}
environment: {{OMP_NUM_THREADS: "1"}}
pass_environment: [SOME_API_KEY]
network: {{lost_after_seconds: {lost_after}}}
"""
START_SECONDS = 120.0  # on a busy machine, up to the first steps
TWO_HOSTS, THREE_HOSTS = "node1 slots=1\nnode2 slots=1\n", "node1 slots=1\nnode2 slots=1\nnode3 slots=1\n"


class Launch:
    """`dstrain run` on the login host of the lab."""

    def __init__(
        self, lab: SshLab, project: Project, hosts: str, nodes: object, launcher: str, *words: str, lost_after: int = 60
    ) -> None:
        self.lab, self.project = lab, project
        (project.folder / "hosts.txt").write_text(hosts)
        profile = PROFILE.format(nodes=nodes, launcher=launcher, lost_after=lost_after)
        self.output = project.folder / "output.txt"
        with self.output.open("w") as output:
            command = lab.entering("ctl", project.command(profile, *words))
            streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, env=os.environ, **streams)

    def said(self) -> str:
        return self.output.read_text()

    def wait_for_step(self, attempt: int, step: int) -> int:
        def words() -> str:
            return f"{self.process.poll()}\n{self.said()}"

        wait_until(lambda: self.project.attempts() == attempt, START_SECONDS, words)
        wait_until(lambda: self.project.step() >= step, START_SECONDS, words)
        return self.project.step()

    def end(self, seconds: float) -> int:
        return self.process.wait(timeout=seconds)


def processes(lab: SshLab, host: str, words: str) -> list[int]:
    """Ids, as the host has them, of what runs there with these words on its command line."""
    found = []
    for line in lab.on(host, ["ps", "-eww", "-o", "pid=", "-o", "args="]).stdout.splitlines():
        pid, _, arguments = line.strip().partition(" ")
        if words in arguments:
            found.append(int(pid))
    return found


def test_pdsh_two_hosts_to_the_end_though_the_link_is_down_for_5_seconds(ssh_lab: SshLab, project: Project) -> None:
    ssh_lab.rekey("node3")  # which is not needed
    launch = Launch(ssh_lab, project, THREE_HOSTS, 2, "pdsh")
    launch.wait_for_step(1, 8)
    assert processes(ssh_lab, "ctl", "pdsh -S -R exec -f 2 -w node1")
    assert not any(processes(ssh_lab, host, SECRET) for host in ("ctl", "node1", "node2"))
    ssh_lab.cut("node2")
    subprocess.run(["sleep", "5"], check=True)
    ssh_lab.heal("node2")
    assert launch.end(150) == 0, launch.said()
    assert "2 ranks on node1, node2" in launch.said()
    assert "not to be a spare host: node3: cannot be reached: Host key verification failed" in launch.said()
    assert project.attempts() == 1 and project.hosts_of(1) == {"node1", "node2"}
    project.check()


def test_openssh_a_host_is_powered_off_and_the_run_goes_on_with_the_rest(ssh_lab: SshLab, project: Project) -> None:
    launch = Launch(ssh_lab, project, THREE_HOSTS, 2, "openssh", lost_after=6)
    launch.wait_for_step(1, 12)
    assert processes(ssh_lab, "ctl", "pdsh") == []
    assert not any(processes(ssh_lab, host, SECRET) for host in ("ctl", "node1", "node2"))
    ssh_lab.kill("node2")
    assert launch.end(200) == 0, launch.said()
    first = project.of_attempt(1, "verdict.json")["first"]
    assert (first["rank"], first["host"]) == (None, "node2")
    assert "the launcher on node2 failed first" in launch.said()
    assert project.attempts() == 2 and project.hosts_of(2) == {"node1", "node3"}
    project.check()


def test_pdsh_the_link_is_cut_for_good_and_the_run_goes_on_with_the_rest(ssh_lab: SshLab, project: Project) -> None:
    launch = Launch(ssh_lab, project, TWO_HOSTS, "1-2", "pdsh", lost_after=6)
    launch.wait_for_step(1, 12)
    ssh_lab.cut("node2")
    wait_until(lambda: project.attempts() == 2, 120, launch.said)
    assert processes(ssh_lab, "node2", "dstrain") == []  # it has ended by itself, before another attempt began
    assert launch.end(150) == 0, launch.said()
    first = project.of_attempt(1, "verdict.json")["first"]
    assert (first["rank"], first["host"]) == (None, "node2")
    assert project.hosts_of(2) == {"node1"}
    project.check()


@pytest.mark.parametrize("launcher", ["pdsh", "openssh"])
def test_a_killed_agent_is_a_failure_and_a_stop_ends_what_this_run_has_started_and_only_that(
    ssh_lab: SshLab, project: Project, tmp_path: Path, launcher: str
) -> None:
    launch = Launch(ssh_lab, project, TWO_HOSTS, 2, launcher, "train.steps=100000")
    launch.wait_for_step(1, 3)
    # somebody else's process on a node, which looks like one of ours, and has nothing to do with this run
    bystander = subprocess.Popen(
        ssh_lab.entering("node1", ["python3", "-c", "import time; time.sleep(300)", "-m", "dstrain.rank"]),
        env={**os.environ, "DSTRAIN_ATTEMPT": str(tmp_path / "another/attempts/0001")},
    )
    (agent,) = processes(ssh_lab, "node2", "-m dstrain.launch.agent")
    ssh_lab.on("node2", ["kill", "-9", str(agent)])
    lines = project.ledger_lines()
    launch.wait_for_step(2, 1)
    wait_until(lambda: project.ledger_lines() > lines + 1, START_SECONDS, launch.said)  # from step 1: nothing was saved
    first = project.of_attempt(1, "verdict.json")["first"]
    assert (first["rank"], first["host"], first["exit_code"]) == (None, "node2", 137)
    assert project.hosts_of(2) == {"node1", "node2"}

    (supervisor,) = [pid for pid in processes(ssh_lab, "ctl", "-m dstrain run") if pid != 1]
    if launcher == "pdsh":  # Ctrl-C
        ssh_lab.on("ctl", ["kill", f"-{signal.SIGINT}", str(supervisor)])
    else:
        run_dir = str(project.run_dir)
        status = json.loads(ssh_lab.on("node1", [*DSTRAIN, "status", run_dir, "--json"]).stdout)
        assert (status["state"], status["transport"], status["supervisor_host"]) == ("running", "ssh", "ctl")
        shown = [(node["host"], [rank["rank"] for rank in node["ranks"]]) for node in status["nodes"]]
        assert shown == [("node1", [0]), ("node2", [1])]
        refused = ssh_lab.on("node1", [*DSTRAIN, "stop", run_dir], check=False)
        assert refused.returncode == 2
        words = f"is supervised from ctl (process {supervisor}), and this is node1; run `dstrain stop` there"
        assert words in refused.stderr
        stopped = ssh_lab.on("ctl", [*DSTRAIN, "stop", run_dir], timeout_seconds=90)
        assert f"stopped, and saved at step {project.step():,};" in stopped.stdout
    assert launch.end(90) == 75, launch.said()
    assert project.of_attempt(2, "outcome.json")["outcome"] == "stopped"
    for host in ("ctl", "node1", "node2"):
        left = processes(ssh_lab, host, "dstrain")
        assert len(left) == (1 if host == "node1" else 0), (host, left)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_every_host_that_cannot_take_part_is_named_before_anything_starts(ssh_lab: SshLab, project: Project) -> None:
    ssh_lab.rekey("node1")
    ssh_lab.cut("node2")
    launch = Launch(ssh_lab, project, THREE_HOSTS, 2, "auto")
    assert launch.end(100) == 2
    assert "error: node1: cannot be reached: Host key verification failed.; try `ssh node1 true`" in launch.said()
    assert "error: node2: cannot be reached: ssh: connect to host node2" in launch.said()
    assert project.attempts() == 0


def test_doctor_names_the_host_with_too_little_shared_memory_and_measures_sound_ones(
    ssh_lab: SshLab, project: Project
) -> None:
    (project.folder / "hosts.txt").write_text(TWO_HOSTS)
    (project.folder / "profile.yaml").write_text(PROFILE.format(nodes=2, launcher="openssh", lost_after=60))
    command = [*DSTRAIN, "doctor", "tiny.yaml", "--on", "profile.yaml", "--json"]

    def doctor() -> tuple[int, dict[str, Any]]:
        done = ssh_lab.on("ctl", command, timeout_seconds=100, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    ssh_lab.on("node2", ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"])
    code, result = doctor()
    errors = [finding for finding in result["findings"] if finding["level"] == "error"]
    assert code == 2 and not result["safe"]
    assert [(error["check"], error["host"]) for error in errors] == [("/dev/shm", "node2")], errors

    ssh_lab.on("node2", ["umount", "/dev/shm"])
    code, result = doctor()
    assert code == 0 and result["safe"], result["findings"]
    (link,) = result["all_reduce_bytes_per_second"]
    assert link["nodes"] == ["node1", "node2"] and link["speed"] > 1e6
    assert len(result["gemm_flops_per_second"]) == 2
    (first,) = {tuple(facts["first_addresses"]) for facts in result["nodes"].values()}
    assert first == (result["nodes"]["node1"]["interfaces"]["eth0"],)
    assert result["seconds"] < 60
    assert not project.run_dir.exists() and not (project.folder / "runs").exists()
