"""Agents started through the local transport, for real; ssh and SLURM are in tests/cluster."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.base.processes import end_marked, kernel_oom_victims, marked_processes
from dstrain.diagnose.causes import explain
from dstrain.diagnose.evidence import Clocks, rank_failures
from dstrain.supervise.attempt import attempt_plan
from dstrain.transport.command import Cluster, Job, rendezvous_port
from dstrain.transport.control import Clock, beat
from dstrain.transport.launchers import LauncherEnd, end_all, launcher_log
from dstrain.transport.node_script import NodeSettings, node_script
from dstrain.transport.transport import TRANSPORTS
from dstrain.transports.pdsh import LINES, FanOut, pdsh_channel
from dstrain.transports.slurm import slurm_channels
from dstrain.transports.ssh import ssh_channels

HERE = Path(__file__).parent
HOSTILE = 'a\'; touch x "$HOME" `id`\nsecond line ünï'


def cluster(folder: Path, environment: dict[str, str], passed: dict[str, str], **settings: object) -> Cluster:
    environment = {"PYTHONPATH": str(HERE), **environment}
    return Cluster("local", ("here",), NodeSettings(folder, sys.executable, environment, passed, **settings))  # type: ignore[arg-type]


def job(run_dir: Path, where: Cluster, entry: str = "stand_in:show_rank", ranks: int = 1) -> Job:
    return Job("tiny", run_dir, ranks, shutdown_timeout_seconds=5, entry=entry, cluster=where)


def start(run: Job, attempt: int = 1) -> subprocess.Popen[bytes]:
    assert run.cluster is not None
    (channel,) = TRANSPORTS[run.cluster.transport].channels(run.cluster)
    process = subprocess.Popen(
        channel.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None
    process.stdin.write(node_script(attempt_plan(run, run.cluster, attempt, run.cluster.settings.passed)).encode())
    process.stdin.flush()
    return process


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "a'; touch x $HOME\nünï"
    folder.mkdir()
    yield folder
    end_marked(folder / "attempts/0001")


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.02)


@pytest.mark.ranks
def test_a_rank_sees_what_the_profile_names_and_nothing_else(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOBODY_NAMED_THIS", "1")
    where = cluster(run_dir, {"WORDS": HOSTILE}, {"API_TOKEN": HOSTILE + "!"})
    process = start(job(run_dir, where))
    assert process.wait(timeout=120) == 0, process.communicate()[0].decode()
    process.communicate()
    (seen,) = [json.loads(file.read_text()) for file in run_dir.glob("seen-*.json")]
    assert seen["cwd"] == str(run_dir)
    assert seen["environment"]["WORDS"] == HOSTILE
    assert seen["environment"]["API_TOKEN"] == HOSTILE + "!"
    assert seen["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NOBODY_NAMED_THIS" not in seen["environment"]
    assert not (run_dir / "x").exists() and not Path("x").exists()


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["stop", "lost"])
def test_the_line_of_control(run_dir: Path, how: str) -> None:
    waiting = ["catch-stop" if how == "stop" else "ignore-stop", "background", "ready", "wait"]
    (run_dir / "script.json").write_text(json.dumps({"1": {"0": waiting, "1": waiting}}))
    process = start(job(run_dir, cluster(run_dir, {}, {}), "stand_in:run_rank", ranks=2))
    wait_until(process, lambda: (run_dir / "ready-0").exists() and (run_dir / "ready-1").exists())
    assert process.stdin is not None
    if how == "stop":
        process.stdin.write(b"\n\nstop\n")
        process.stdin.flush()
    else:
        process.stdin.close()
    assert process.wait(timeout=120) == (0 if how == "stop" else 1)
    report = json.loads((run_dir / "attempts/0001/agents/node-00000.json").read_text())
    assert report["signal"] == ("SIGTERM" if how == "stop" else "the supervisor is gone")
    if how == "lost":
        assert marked_processes(run_dir / "attempts/0001") == []


@pytest.mark.ranks
def test_other_code_than_was_submitted_is_not_run(run_dir: Path) -> None:
    where = cluster(run_dir, {}, {})
    process = start(job(run_dir, Cluster("local", ("here",), where.settings, code="0123456789abcdef")))
    assert process.wait(timeout=120) == 2, process.communicate()[0].decode()
    process.communicate()
    (failure,) = rank_failures(run_dir / "attempts/0001", [LauncherEnd({0: "here"}, 2)], None, time.time())
    assert (failure.kind, failure.host) == ("user", "here")
    assert "the run was started with 0123456789abcdef" in failure.message


@pytest.mark.ranks
def test_a_script_that_arrives_in_part_does_nothing(run_dir: Path) -> None:
    run = job(run_dir, cluster(run_dir, {}, {}))
    assert run.cluster is not None
    script = node_script(attempt_plan(run, run.cluster, 1, {}))
    (channel,) = TRANSPORTS[run.cluster.transport].channels(run.cluster)
    part = script[: script.index("export DSTRAIN_ATTEMPT")] + "touch y\n"
    subprocess.run(channel.arguments, input=part.encode(), capture_output=True, check=False, timeout=120)
    assert list(run_dir.iterdir()) == []


def test_the_script_of_a_node() -> None:
    settings = NodeSettings(
        Path("/home/me/it's mine"),
        "python",
        environment={"NCCL_DEBUG": "WARN", "TITLE": HOSTILE},
        passed={"WANDB_API_KEY": "(redacted)"},
        modules=("cuda/12.4", "a b"),
        venv="/home/me/$venv",
        container=("apptainer", "exec", "--nv", "my image.sif"),
        interface="ib0",
    )
    run = Job("a", Path("/runs/a'; touch x"), 4, cluster=Cluster("ssh", ("me@node1", "node2"), settings, 29500, "00ff"))
    assert run.cluster is not None
    assert (
        node_script(attempt_plan(run, run.cluster, 3, settings.passed))
        == r"""main() {
set -e
cd -- '/home/me/it'"'"'s mine'
unset OLDPWD
module load cuda/12.4 </dev/null
module load 'a b' </dev/null
source '/home/me/$venv/bin/activate' </dev/null
export DSTRAIN_ATTEMPT='/runs/a'"'"'; touch x/attempts/0003'
export GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG=WARN
export NCCL_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=$(( $(nproc) > 4 ? $(nproc) / 4 : 1 ))
export TITLE='a'"'"'; touch x "$HOME" `id`
second line ünï'
export WANDB_API_KEY='(redacted)'
exec apptainer exec --nv 'my image.sif' python -u -m dstrain.agent.agent --run-dir '/runs/a'"'"'; touch x' \
--attempt 3 --entry dstrain.train.main:run_rank --nodes 2 --rendezvous node1:29500 --ranks 4 --shutdown-timeout 600 \
--control --silence 120 --code 00ff --node-rank "$1"
}
main "$@"
""".replace(" \\\n", " ")
    )


def test_ssh_gets_one_connection_for_each_host_and_nothing_secret_on_its_command_line() -> None:
    first, second = ssh_channels(["node1", "me@node2"], 60)
    assert (first.nodes, second.nodes) == ((0,), (1,))
    assert first.arguments[-3:-1] == ("--", "node1")
    assert {"StrictHostKeyChecking=yes", "ServerAliveInterval=10", "ServerAliveCountMax=6"} <= set(first.arguments)
    assert second.arguments[-1].endswith("dstrain-node 1; exit")
    assert second.arguments[-1].startswith('bash -c \'exec env -i HOME="$HOME" ')


needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh: apt-get install pdsh")
HOSTS = ["node3", "me@node1", "10.0.0.7", "fe80::1"]


def test_what_pdsh_is_given() -> None:
    (channel,) = pdsh_channel(["node1", "me@node2"], 60)
    *pdsh, script, name, first, second = channel.arguments
    assert pdsh == ["pdsh", "-S", "-R", "exec", "-f", "2", "-w", "node1,me@node2", "sh", "-c"]
    assert (name, first, second) == ("dstrain-pdsh", "node1", "me@node2")
    (connection,) = ssh_channels(["HOST"], 60)
    before, _, after = script.partition(shlex.join(connection.arguments[:-2]))
    assert before == "shift %n\n"
    entry = shlex.quote(connection.arguments[-1].replace("dstrain-node 0", "dstrain-node %n"))
    assert after == (
        f""" "$1" {entry} <"$DSTRAIN_LINES/%n" >>"$DSTRAIN_LINES/%n.log" 2>&1
code=$?
echo "$code" >"$DSTRAIN_LINES/%n.code"
exit "$code"
"""
    )


@needs_pdsh
def test_each_node_has_a_line_an_exit_code_and_a_log_of_its_own_through_pdsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pdsh; in place of ssh a program that says what it was given. Node 1 is killed, node 2 ends with 3."""
    folder = tmp_path / "50% a'; touch x $HOME ü"
    (folder / "bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("WCOLL", "/nowhere")
    monkeypatch.setenv("DSHPATH", "/nowhere")
    (folder / "bin/ssh").write_text(
        "#!/usr/bin/python3\nimport os, sys\nhost, entry = sys.argv[-2], sys.argv[-1][:-6]\n"
        "print(host, entry[-2:], sys.stdin.readline().strip(), flush=True)\n"
        'if entry.endswith(" 1"): os.kill(os.getpid(), 9)\nif entry.endswith(" 2"): sys.exit(3)\n'
        "print(sys.stdin.read().split())\n"
    )
    (folder / "bin/ssh").chmod(0o755)
    (channel,) = pdsh_channel(HOSTS, 60)
    attempt = folder / "attempts/0001"
    launcher = FanOut(dict(enumerate(HOSTS)), channel.arguments, attempt, "secret\n")
    assert "secret" not in " ".join(channel.arguments)
    deadline = time.monotonic() + 120
    # empty for a moment: a program has begun before the kernel has its environment in place
    while not (environment := Path(f"/proc/{launcher.process.pid}/environ").read_text()):
        assert time.monotonic() < deadline
    (pipes,) = {line for line in environment.split("\0") if LINES in line}
    assert (Path(pipes.partition("=")[2]).stat().st_mode & 0o777) == 0o700
    while [end.exit_code for end in launcher.ends()] != [-9, 137, 3, -9]:  # 0 and 3 have not ended: no code yet
        assert time.monotonic() < deadline, launcher.ends()
        time.sleep(0.02)
    assert launcher.running and launcher.has_failed
    launcher.stop()
    end_all([launcher])
    assert launcher.process.wait(timeout=120) != 0
    assert {end.hosts[node]: end.exit_code for node, end in enumerate(launcher.ends())} == dict(
        zip(HOSTS, [0, 137, 3, 0], strict=True)
    )
    assert launcher_log(attempt, "node3").read_text() == "node3  0 secret\n['stop']\n"
    assert launcher_log(attempt, "me@node1").read_text().startswith("me@node1  1 secret\n")
    assert launcher_log(attempt, "fe80::1").read_text() == "fe80::1  3 secret\n['stop']\n"
    assert marked_processes(attempt) == []


@needs_pdsh
@pytest.mark.slow
def test_what_a_dry_run_shows_of_pdsh_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text('#!/bin/sh\nread -r line; echo "$line"; exit 4\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (channel,) = pdsh_channel(["node1", "node2"], 60)
    shell = channel.as_shell("first line\nsecond\n")
    done = subprocess.run(["bash", "-c", shell], capture_output=True, check=False, timeout=120)
    assert done.returncode == 4, done.stderr
    assert [file.read_text() for file in sorted(tmp_path.glob("tmp.*/*.log"))] == ["first line\n"] * 2


def test_srun_numbers_the_nodes_as_the_plan_does() -> None:
    (channel,) = slurm_channels(["n1", "n3"], cpus_per_task=12)
    assert channel.nodes == (0, 1)
    assert channel.arguments[:6] == (
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n3", "--distribution=block"),
    )
    assert "--cpus-per-task=12" in channel.arguments
    assert channel.arguments[-1] == "dstrain-node"


def test_the_port_changes_with_the_attempt_and_is_never_an_ephemeral_one() -> None:
    ports = {rendezvous_port(Path("/runs/a"), attempt) for attempt in range(1, 100)}
    assert len(ports) > 90
    assert all(20_000 <= port < 32_000 for port in ports)


def test_an_agents_clock_is_compared_with_the_supervisors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sign of life waited in a pipe for 5 s, the second travelled for 2 ms; the clocks are 1000 s apart."""
    now, clock = 1000.0, Clock()
    monkeypatch.setattr("dstrain.transport.control.time.monotonic", lambda: now)
    line = beat()
    now += 1005.0
    clock.hear(line.rstrip())
    assert clock.ahead_seconds == pytest.approx(1005.0)
    now = 1010.0
    line = beat()
    now += 1000.002
    for heard in (line, b"", b"stop", b"t1" + line):
        clock.hear(heard.rstrip())
    assert clock.ahead_seconds == pytest.approx(1000.002)
    clocks = Clocks.of([{"host": "node7", "clock_ahead_seconds": 1000.0}, {"host": "node8"}])
    assert clocks.here("node7", 1500.0, 0.0) == 500.0
    assert clocks.here("node8", 1500.0, 100.0) == 100.0 + clocks.monotonic_less_unix  # it never heard of us


def test_the_kernels_log_is_read_for_this_boot() -> None:
    """That it names a victim is shown by the drill, whose rank is really killed for memory."""
    assert kernel_oom_victims(time.monotonic()) in (set(), None)


@pytest.mark.ranks
def test_an_agent_that_finds_its_port_taken_says_so(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = replace(cluster(run_dir, {}, {}), hosts=("127.0.0.1", "other"), rendezvous_port=taken.getsockname()[1])
        process = start(job(run_dir, here))
        assert process.wait(timeout=120) == 1
        process.communicate()
    attempt = run_dir / "attempts/0001"
    (failure,) = rank_failures(attempt, [LauncherEnd({0: "127.0.0.1"}, 1)], None, time.time())
    assert (failure.rank, failure.host, failure.is_lost_node, failure.is_consequence) == (
        None,
        "127.0.0.1",
        False,
        False,
    )
    assert "EADDRINUSE" in failure.message
    assert explain(failure, None)[0] == "another program holds the port of the process group"
