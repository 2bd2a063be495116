"""`dstrain run --on` an ssh profile, through pdsh and OpenSSH, on real daemons: hosts and links that are lost."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster_run import DSTRAIN, HANG_SECONDS, SECRET, Project, wait_until
from ssh_lab import SshLab

import dstrain.errors
from dstrain.base.phases import RankPhase
from dstrain.proof.fault_entry import ENTRY, Order, Orders
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe

PROFILE = """\
transport: ssh
nodes: {nodes}
hosts: {{file: hosts.txt, launcher: {launcher}}}
environment: {environment}
pass_environment: [SOME_API_KEY]
network: {{lost_after_seconds: {lost_after}}}
on_hang: {on_hang}
"""
START_SECONDS = 300.0  # on a busy machine, up to the first steps
END_SECONDS = 600.0
TWO_HOSTS, THREE_HOSTS = "node1 slots=1\nnode2 slots=1\n", "node1 slots=1\nnode2 slots=1\nnode3 slots=1\n"


def profile_with(**changes: object) -> str:
    """The profile for two hosts through OpenSSH, or with these values."""
    values = {"nodes": 2, "launcher": "openssh", "lost_after": 60, "on_hang": "restart", "environment": {}} | changes
    environment = json.dumps({"OMP_NUM_THREADS": "1"} | values["environment"])  # type: ignore[operator]
    return PROFILE.format(**(values | {"environment": environment}))


class Launch:
    """`dstrain run` on the login host of the lab."""

    def __init__(
        self, lab: SshLab, project: Project, hosts: str, nodes: object, launcher: str, *words: str, **changes: object
    ) -> None:
        self.lab, self.project = lab, project
        (project.folder / "hosts.txt").write_text(hosts)
        profile = profile_with(nodes=nodes, launcher=launcher, **changes)
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

    def end(self) -> int:
        return self.process.wait(timeout=END_SECONDS)


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
    assert launch.end() == 0, launch.said()
    assert "2 ranks on node1, node2" in launch.said()
    assert "not to be a spare host: node3: cannot be reached: Host key verification failed" in launch.said()
    assert project.attempts() == 1 and project.hosts_of(1) == {"node1", "node2"}
    project.check()


def test_openssh_a_host_is_powered_off_and_the_run_goes_on_with_the_rest(ssh_lab: SshLab, project: Project) -> None:
    launch = Launch(ssh_lab, project, THREE_HOSTS, 2, "openssh", lost_after=10)
    launch.wait_for_step(1, 12)
    assert processes(ssh_lab, "ctl", "pdsh") == []
    assert not any(processes(ssh_lab, host, SECRET) for host in ("ctl", "node1", "node2"))
    ssh_lab.kill("node2")
    assert launch.end() == 0, launch.said()
    first = project.of_attempt(1, "verdict.json")["first"]
    assert (first["rank"], first["host"]) == (None, "node2")
    assert "the launcher on node2 failed first" in launch.said()
    assert project.attempts() == 2 and project.hosts_of(2) == {"node1", "node3"}
    project.check()


def test_pdsh_the_link_is_cut_for_good_and_the_run_goes_on_with_the_rest(ssh_lab: SshLab, project: Project) -> None:
    launch = Launch(ssh_lab, project, TWO_HOSTS, "1-2", "pdsh", lost_after=10)
    launch.wait_for_step(1, 12)
    ssh_lab.cut("node2")
    wait_until(lambda: project.attempts() == 2, START_SECONDS, launch.said)
    assert processes(ssh_lab, "node2", "dstrain") == []  # it has ended by itself, before another attempt began
    assert launch.end() == 0, launch.said()
    first = project.of_attempt(1, "verdict.json")["first"]
    assert (first["rank"], first["host"]) == (None, "node2")
    assert project.hosts_of(2) == {"node1"}
    assert "nodes 1-2, and 2 there: 2 used" in launch.said()
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
    (agent,) = processes(ssh_lab, "node2", "-m dstrain.agent.agent")
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
        stopped = ssh_lab.on("ctl", [*DSTRAIN, "stop", run_dir], timeout_seconds=300)
        assert f"stopped, and saved at step {project.step():,};" in stopped.stdout
    assert launch.end() == 75, launch.said()
    assert project.of_attempt(2, "outcome.json")["outcome"] == "stopped"
    for host in ("ctl", "node1", "node2"):
        left = processes(ssh_lab, host, "dstrain")
        assert len(left) == (1 if host == "node1" else 0), (host, left)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_rank_that_hangs_is_named_with_its_host_and_stack_and_the_run_ends_or_goes_on_as_the_profile_says(
    ssh_lab: SshLab, project: Project
) -> None:
    Orders().write(project.run_dir)
    words = (f"hang_timeout_seconds={HANG_SECONDS}", "--entry", ENTRY)
    launch = Launch(ssh_lab, project, TWO_HOSTS, 2, "openssh", *words, on_hang="stop")
    launch.wait_for_step(1, 12)
    ssh_lab.on("node2", ["kill", "-STOP", str(project.of_attempt(1, "ranks/rank-00001.json")["pid"])])
    assert launch.end() == 1, launch.said()
    cause = "something stopped its process: SIGSTOP, or a debugger"
    project.check_hang(1, 1, "node2", cause, "give up")
    assert "attempt 1: rank 1 on node2 failed first at step" in launch.said()
    assert [processes(ssh_lab, host, "dstrain") for host in ("node1", "node2")] == [[], []]

    lines = project.ledger_lines()
    launch = Launch(ssh_lab, project, TWO_HOSTS, 2, "pdsh", *words)
    wait_until(lambda: project.ledger_lines() > lines + 1, START_SECONDS, launch.said)
    # it moves no more, though its process runs, and it is alone on its host: that it is behind shows only from afar
    Orders(order=Order("hang", rank=0, attempt=2, step=0, phase=RankPhase.FORWARD)).write(project.run_dir)
    assert launch.end() == 0, launch.said()
    cause = "it hangs, and the other ranks waited for it"
    first = project.check_hang(2, 0, "node1", cause, "restart")
    assert first["phase"] == "forward"
    assert any(frame.startswith("hang (dstrain/proof/fault_entry.py:") for frame in first["hang"]["stack"])
    assert project.attempts() == 3 and project.hosts_of(3) == {"node1", "node2"}
    project.check()


def test_every_host_that_cannot_take_part_is_named_before_anything_starts(ssh_lab: SshLab, project: Project) -> None:
    ssh_lab.rekey("node1")
    ssh_lab.cut("node2")
    launch = Launch(ssh_lab, project, THREE_HOSTS, 2, "auto")
    assert launch.end() == 2
    assert "error: node1: cannot be reached: Host key verification failed.; try `ssh node1 true`" in launch.said()
    assert "error: node2: cannot be reached: ssh: connect to host node2" in launch.said()
    assert project.attempts() == 0


def test_hosts_with_other_code_data_or_time_or_without_python_are_named_before_anything_starts(
    ssh_lab: SshLab, project: Project
) -> None:
    folder, file = project.folder, Path(dstrain.errors.__file__)
    recipe = load_recipe(folder / "tiny.yaml").recipe
    assert isinstance(recipe, MaskedLmRecipe)
    ssh_lab.on("node1", ["mount", "-t", "tmpfs", "tmpfs", sys.prefix])
    (folder / "other.py").write_text(f"{file.read_text()}# of another version\n")
    ssh_lab.on("node2", ["mount", "--bind", str(folder / "other.py"), str(file)])
    ssh_lab.on("node3", ["mount", "-t", "tmpfs", "tmpfs", recipe.data.train])
    # hosts of a lab share this machine's clock: Python there is told another time
    (folder / "python").mkdir()
    (folder / "python/sitecustomize.py").write_text("")
    (folder / "late.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 3600\n")
    ssh_lab.on("node3", ["mount", "--bind", str(folder / "late.py"), str(folder / "python/sitecustomize.py")])
    launch = Launch(ssh_lab, project, THREE_HOSTS, 3, "auto", environment={"PYTHONPATH": str(folder / "python")})
    assert launch.end() == 2
    errors = re.findall(r"^(?:error: )?(node\d: .*?);", launch.said(), re.MULTILINE)
    assert re.fullmatch(
        rf"node1: {re.escape(sys.executable)} does not run there: .*No such file or directory", errors[0]
    )
    assert re.fullmatch(r"node2: has other code of dstrain \(\w+, here \w+\)", errors[1])
    assert re.fullmatch(r"node3: its clock is off by -3[56]\d\d s", errors[2])
    assert errors[3:] == [f"node3: {recipe.data.train} is missing, empty or not readable"]
    assert project.attempts() == 0


def test_doctor_names_the_host_with_too_little_shared_memory_and_measures_sound_ones(
    ssh_lab: SshLab, project: Project
) -> None:
    (project.folder / "hosts.txt").write_text(TWO_HOSTS)
    (project.folder / "profile.yaml").write_text(profile_with())
    command = [*DSTRAIN, "doctor", "tiny.yaml", "--on", "profile.yaml", "--json"]

    def doctor() -> tuple[int, dict[str, Any]]:
        done = ssh_lab.on("ctl", command, timeout_seconds=300, check=False)
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
