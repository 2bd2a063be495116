"""The labs behave as the clusters that they stand for, and leave nothing behind."""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lab
import pytest
from lab_host import LabError
from slurm_lab import SlurmLab
from ssh_lab import SshLab

WAIT_SECONDS = 200.0  # for what happens within seconds, on a busy machine too
LAB = Path(__file__).parents[2] / "tools" / "lab" / "lab.py"


def write_script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return str(path)


def sbatch(lab: SlurmLab, *arguments: str) -> str:
    return lab.run("sbatch", "--parsable", *arguments).stdout.strip()


def job(lab: SlurmLab, number: str) -> dict[str, str]:
    """What SLURM knows of a job, finished ones included."""
    fields = lab.run("scontrol", "show", "job", "--oneliner", number).stdout.split()
    return dict(field.split("=", 1) for field in fields if "=" in field)


def wait_for_state(lab: SlurmLab, number: str, *states: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (state := job(lab, number)["JobState"]) not in states:
        assert time.monotonic() < deadline, f"job {number} is {state} after {seconds} s, not {' or '.join(states)}"
        time.sleep(0.2)


def wait_for_line(path: Path, line: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or line not in path.read_text().splitlines():
        assert time.monotonic() < deadline, f"no line {line!r} in {path} after {seconds} s"
        time.sleep(0.1)


# ---------------------------------------------------------------- SLURM


def test_every_slurm_node_has_its_own_name_and_processes(slurm_lab: SlurmLab) -> None:
    command = 'echo "$SLURMD_NODENAME $(hostname) $(getent hosts node3 | cut -d" " -f1) $(cat /proc/1/comm)"'
    lines = slurm_lab.run("srun", "--nodes=2", "bash", "-c", command).stdout.splitlines()
    assert len(lines) == 2
    names, hostnames, addresses, inits = zip(*sorted(line.split() for line in lines), strict=True)
    assert names == hostnames == ("node1", "node2")
    assert addresses[0] == addresses[1] and addresses[0].startswith("127.77.")
    assert inits == ("sh", "sh")


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (7, "FAILED")])
def test_exit_code_of_a_batch_script_is_the_jobs(slurm_lab: SlurmLab, tmp_path: Path, code: int, state: str) -> None:
    number = sbatch(slurm_lab, f"--output={tmp_path}/out", f"--wrap=exit {code}")
    wait_for_state(slurm_lab, number, "COMPLETED", "FAILED", seconds=WAIT_SECONDS)
    assert (job(slurm_lab, number)["JobState"], job(slurm_lab, number)["ExitCode"]) == (state, f"{code}:0")


def test_pretended_gpus_are_handed_out(slurm_lab: SlurmLab) -> None:
    assert slurm_lab.run("srun", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES").stdout == "0,1\n"


def test_requeued_job_starts_again(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    script = write_script(tmp_path / "job", "echo start ${SLURM_RESTART_COUNT:-0}", "sleep 300")
    number = sbatch(slurm_lab, "--requeue", "--open-mode=append", f"--output={tmp_path}/out", script)
    wait_for_line(tmp_path / "out", "start 0", seconds=WAIT_SECONDS)
    slurm_lab.run("scontrol", "requeue", number)
    wait_for_line(tmp_path / "out", "start 1", seconds=WAIT_SECONDS)


def test_preempted_job_gets_its_signal_and_comes_back(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "job",
        "#SBATCH --nodes=3 --exclusive --requeue --open-mode=append --signal=B:USR1@1",
        "echo start ${SLURM_RESTART_COUNT:-0}",
        # a job that ended here by itself would be COMPLETED or FAILED, and would not come back
        "trap 'echo signalled; scontrol requeue $SLURM_JOB_ID' USR1",
        "sleep 300 & while kill -0 $! 2>/dev/null; do wait $!; done",
    )
    number = sbatch(slurm_lab, f"--output={tmp_path}/out", script)
    wait_for_line(tmp_path / "out", "start 0", seconds=WAIT_SECONDS)
    urgent = sbatch(slurm_lab, "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for_state(slurm_lab, urgent, "COMPLETED", seconds=WAIT_SECONDS)
    wait_for_line(tmp_path / "out", "start 1", seconds=WAIT_SECONDS)
    assert "signalled" in (tmp_path / "out").read_text().splitlines()
    assert job(slurm_lab, number)["Restarts"] == "1"


def test_reset_ends_jobs_and_what_they_left_running(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "job", "trap : TERM", "setsid sleep 314 &", "echo started", "while :; do wait; done"
    )
    number = sbatch(slurm_lab, f"--output={tmp_path}/out", "--nodelist=node1", script)
    wait_for_line(tmp_path / "out", "started", seconds=WAIT_SECONDS)
    assert slurm_lab.on("node1", ["pgrep", "-f", "sleep 314"]).stdout != ""
    slurm_lab.reset()
    assert slurm_lab.on("node1", ["pgrep", "-f", "sleep 314"], check=False).stdout == ""
    assert job(slurm_lab, number)["JobState"] in ("CANCELLED", "FAILED")


def test_job_of_a_dead_node_moves_to_another(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "job",
        "#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive --requeue --open-mode=append",
        "srun bash -c 'echo start ${SLURM_RESTART_COUNT:-0} $SLURMD_NODENAME; exec sleep 300'",
    )
    sbatch(slurm_lab, f"--output={tmp_path}/out", script)
    wait_for_line(tmp_path / "out", "start 0 node2", seconds=WAIT_SECONDS)
    slurm_lab.kill_node("node2")
    assert not slurm_lab.status()["node2"]
    wait_for_line(tmp_path / "out", "start 1 node3", seconds=WAIT_SECONDS)
    assert (
        slurm_lab.run("sinfo", "--noheader", "--partition=main", "--nodes=node2", "--format=%T").stdout.strip()
        == "down*"
    )
    slurm_lab.revive_node("node2")
    assert slurm_lab.run("srun", "--nodelist=node2", "hostname").stdout == "node2\n"


# ---------------------------------------------------------------- ssh


def ssh(lab: SshLab, host: str, *command: str) -> subprocess.CompletedProcess[str]:
    # of a host that is cut off, nothing comes for as long as one waits
    limit = 30 if lab.status()[host] == "up" else 2
    return lab.on("ctl", ["ssh", "-o", f"ConnectTimeout={limit}", host, *command], check=False)


def test_every_ssh_host_has_its_own_name_network_and_processes(ssh_lab: SshLab) -> None:
    for name in ("node1", "node2", "node3"):
        done = ssh(ssh_lab, name, "hostname; ls /sys/class/net; ls -d /proc/[0-9]* | wc -l")
        hostname, *cards, processes = done.stdout.split()
        assert (hostname, cards) == (name, ["eth0", "lo"])
        assert int(processes) < 20
    outside = ssh_lab.on("node1", ["ip", "route"])
    assert outside.stdout.split() == [
        "10.77.0.0/24",
        "dev",
        "eth0",
        "proto",
        "kernel",
        "scope",
        "link",
        "src",
        "10.77.0.1",
    ]


def test_hosts_reach_each_other_and_pdsh_reaches_all(ssh_lab: SshLab) -> None:
    assert ssh(ssh_lab, "node1", "ssh", "node2", "hostname").stdout == "node2\n"
    done = ssh_lab.on("ctl", ["pdsh", "-S", "-R", "ssh", "-w", "node[1-3]", "hostname"])
    assert sorted(done.stdout.splitlines()) == ["node1: node1", "node2: node2", "node3: node3"]
    assert ssh(ssh_lab, "node1", "exit 7").returncode == 7


def test_command_that_takes_too_long_is_ended_on_its_host(ssh_lab: SshLab) -> None:
    assert ssh_lab.on("node1", ["sleep", "311"], timeout_seconds=0.5, check=False).returncode == 124
    assert ssh_lab.on("node1", ["pgrep", "-f", "sleep 311"], check=False).stdout == ""


def test_unknown_host_key_is_refused_until_trusted(ssh_lab: SshLab) -> None:
    ssh_lab.rekey("node2")
    refused = ssh(ssh_lab, "node2", "true")
    assert refused.returncode == 255 and "Host key verification failed" in refused.stderr
    ssh_lab.trust()
    assert ssh(ssh_lab, "node2", "true").returncode == 0


def test_cut_link_heals_with_its_connections(ssh_lab: SshLab) -> None:
    command = ssh_lab.entering("ctl", ["ssh", "node2", "echo before; sleep 1.5; echo after"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as connection:
        assert connection.stdout is not None and connection.stdout.readline() == "before\n"
        ssh_lab.cut("node2")
        assert ssh_lab.status() == {"ctl": "up", "node1": "up", "node2": "cut", "node3": "up"}
        assert ssh(ssh_lab, "node2", "true").returncode == 255
        ssh_lab.heal("node2")
        assert connection.stdout.readline() == "after\n"
    assert connection.returncode == 0


def test_killed_host_loses_its_processes_and_boots_again(ssh_lab: SshLab) -> None:
    ssh(ssh_lab, "node3", "nohup sleep 312 >/dev/null 2>&1 &")
    assert ssh_lab.on("node3", ["pgrep", "-f", "sleep 312"]).returncode == 0
    ssh_lab.kill("node3")
    assert ssh_lab.status()["node3"] == "down"
    assert ssh(ssh_lab, "node3", "true").returncode == 255
    ssh_lab.boot("node3")
    assert ssh(ssh_lab, "node3", "hostname").stdout == "node3\n"
    assert ssh_lab.on("node3", ["pgrep", "-f", "sleep 312"], check=False).stdout == ""


# ---------------------------------------------------------------- nothing is left


def namespaces_of(folder: Path) -> set[str]:
    """Namespaces, beside this machine's own, of the hosts in a lab's folder."""
    kinds = ("pid", "mnt", "uts", "ipc", "net")
    own = {str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in kinds}
    inits = [file.read_text().strip() for file in folder.glob("*/init.pid")]
    return {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for pid in inits for kind in kinds} - own


def processes_in(namespaces: set[str]) -> dict[tuple[str, str], str]:
    """Command names of processes in any of the namespaces, by pid and time of start.

    The kernel gives the number of a namespace that is gone to the next one, whoever makes it.
    """
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = {str(link.readlink()) for link in (process / "ns").iterdir()}
            if inside & namespaces:
                started = (process / "stat").read_text().rpartition(")")[2].split()[19]
                found[process.name, started] = (process / "comm").read_text().strip()
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.parametrize("kind", ["slurm", "ssh"])
def test_second_lab_beside_the_first_goes_without_a_trace(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    first: SlurmLab | SshLab = request.getfixturevalue(f"{kind}_lab")
    outside = [Path("/etc/hosts"), Path("/etc/hostname"), Path("/etc/ssh/ssh_config"), Path("/proc/self/mountinfo")]
    before = [file.read_text() for file in outside]
    folder = Path(tempfile.mkdtemp(prefix="lab-second-"))
    command = [sys.executable, str(LAB), kind]
    place = ["--run-dir", str(folder)]
    try:
        subprocess.run([*command, "up", "--nodes", "2", *place], check=True, capture_output=True)
        subprocess.run([*command, "up", *place], check=True, capture_output=True)  # again: nothing to do
        listed = subprocess.run([*command, "status", *place], check=True, capture_output=True, text=True).stdout
        assert listed.split() == ["ctl", "up", "node1", "up", "node2", "up"]
        background = [*command, "on", *place, "node1", "sh", "-c", "setsid sleep 313 >/dev/null 2>&1 &"]
        subprocess.run(background, check=True)
        namespaces = namespaces_of(folder)
        there = processes_in(namespaces)
        assert "sleep" in there.values()
    finally:
        subprocess.run([*command, "down", *place], check=True, capture_output=True)
    assert not there.keys() & processes_in(namespaces).keys()
    assert not folder.exists()
    assert [file.read_text() for file in outside] == before
    assert all(state in (True, "up") for state in first.status().values())


@pytest.mark.parametrize("make", [SlurmLab, SshLab])
def test_folder_that_holds_something_else_is_left_alone(
    make: Callable[[Path], SlurmLab | SshLab], tmp_path: Path
) -> None:
    (tmp_path / "precious").touch()
    for change in (make(tmp_path).up, make(tmp_path).down):
        with pytest.raises(LabError, match="not empty and no lab"):
            change()
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_folder_that_daemons_could_not_work_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="at most 60 characters"):
        SlurmLab(tmp_path / ("x" * 60)).up()
    with pytest.raises(LabError, match="at most 60 characters"):
        SshLab(Path("/tmp/a b")).up()
    with pytest.raises(LabError, match="a /run of its own"):
        SshLab(Path("/run/lab")).up()


def test_the_page_shows_every_command_as_it_is() -> None:
    page = (LAB.parents[2] / "docs" / "lab.md").read_text()
    shown = re.findall(r"^.*python tools/lab/lab\.py (.+?)(?: {3,}|\)\"|$)", page, re.MULTILINE)
    parsed = [lab.parser().parse_args(shlex.split(command)) for command in shown]
    ssh = {"up", "down", "on", "cut", "heal", "kill", "boot", "rekey", "trust"}
    assert {options.action for options in parsed if options.kind == "ssh"} == ssh
    slurm = {"up", "down", "on", "env", "kill-node", "revive-node", "reset"}
    assert {options.action for options in parsed if options.kind == "slurm"} == slurm
