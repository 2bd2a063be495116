"""`dstrain run --on PROFILE` up to the point where something would be started, and what decides on the nodes."""

import contextlib
import io
import subprocess
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from dstrain.cli import parse
from dstrain.errors import UserError
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.supervise.run import dry_run, run_command
from dstrain.transport.cluster import choose_hosts, nodes_in_words, spare_hosts, usable_nodes
from dstrain.transport.command import Cluster, Job
from dstrain.transport.hostfile import Host
from dstrain.transport.node_script import NodeSettings

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Recipe]
) -> Callable[..., Namespace]:
    """`arguments(profile, *words)` of `dstrain run tiny.yaml --on p.yaml` in an empty folder."""
    folder = tmp_path / "it's"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    Path("tiny.yaml").write_text(resolved_yaml(tiny_recipe()))
    Path("hosts").write_text("node1 slots=2\nnode2 slots=2\nnode3 slots=2\n")

    def make(profile: str, *words: str) -> Namespace:
        Path("p.yaml").write_text(profile)
        return parse(["run", "tiny.yaml", "--on", "p.yaml", *words])

    return make


def printed(arguments: Namespace) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert run_command(arguments) == 0
    return output.getvalue()


def test_a_dry_run_over_ssh_shows_each_hosts_command_and_no_secret(
    arguments: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "sk-123")
    profile = "transport: ssh\nnodes: 2\nhosts: {file: hosts, launcher: openssh}\npass_environment: [SOME_TOKEN]\n"
    asked = arguments(profile, "--dry-run", "--procs-per-node", "1")
    before = sorted(Path().iterdir())
    text = printed(asked)
    lines = text.splitlines()
    assert lines[0] == "# 2 ranks × 2 rows × 2 accumulation = 8 rows = 256 tokens"
    assert [line for line in lines if line.startswith("# node")] == ["# node 0: node1", "# node 1: node2"]
    assert text.count("export SOME_TOKEN='(redacted)'") == 2
    assert text.count("--nodes 2 --rendezvous node1:") == 2
    assert "sk-123" not in text
    assert sorted(Path().iterdir()) == before


def test_a_dry_run_says_how_many_nodes_of_a_range_are_used(arguments: Callable[..., Namespace]) -> None:
    profile = "transport: ssh\nnodes: 2-4\nprocs_per_node: 1\nhosts: {file: hosts, launcher: openssh}\n"
    lines = printed(arguments(profile, "--dry-run")).splitlines()
    assert lines[0] == "# 3 ranks: 2 or 3 of 8 rows each, 67 % used"
    assert lines[1] == "# nodes 2-4, and 3 there: 3 used"
    assert [line for line in lines if line.startswith("# node ")] == [
        "# node 0: node1",
        "# node 1: node2",
        "# node 2: node3",
    ]
    assert nodes_in_words((2, 9), 7, 4) == "nodes 2-9, and 7 there: 4 used, as there are rows for no more"
    assert nodes_in_words((2, 9), 12, 9) == "nodes 2-9, and 12 there: 9 used"
    assert nodes_in_words((2, 2), 3, 2) is None


def test_a_dry_run_prints_what_a_shell_can_run(arguments: Callable[..., Namespace]) -> None:
    profile = 'transport: local\nenvironment: {A: "END OF NODE SCRIPT\\nb\'"}\n'
    text = printed(arguments(profile, "--dry-run", "--run-dir", "a'; touch x\ntouch y; `touch z` $HOME ü"))
    script = text.replace(
        " -u -m dstrain.agent.agent ", " -c 'import os; print(os.getcwd(), repr(os.environ[\"A\"]))' "
    )
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, timeout=60, check=False)
    assert str(Path.cwd()) in done.stdout, done.stderr
    assert "END OF NODE SCRIPT\\nb'" in done.stdout
    assert not {"x", "y", "z"} & {file.name for file in Path().iterdir()}


@pytest.mark.parametrize("launcher", ["openssh", "pdsh"])
def test_a_dry_run_over_ssh_whole(launcher: Literal["openssh", "pdsh"]) -> None:
    folder = Path("/nowhere/a'; touch x $HOME `id`/zwei\nZeilen ü")
    environment, passed = {"TITLE": 'a\'; touch x "$HOME"\nü'}, {"SOME_TOKEN": "sk-123"}
    settings = NodeSettings(
        folder / "its folder", "/venv v/bin/python", environment, passed, container=("enroot", "ü x")
    )
    cluster = Cluster("pdsh" if launcher == "pdsh" else "ssh", ("node1", "me@node2"), settings, 29500, "00ff")
    text = dry_run(Job("tiny", folder, 1, cluster=cluster), cluster)
    assert text == (GOLDEN / f"dry-run-{launcher}.txt").read_text(encoding="utf-8").rstrip("\n")


def test_a_dry_run_on_slurm_prints_the_batch_script(arguments: Callable[..., Namespace]) -> None:
    text = printed(arguments("transport: slurm\nnodes: 1-3\nprocs_per_node: 2\nslurm: {}\n", "--dry-run"))
    assert text.startswith("#!/bin/bash --login\n#SBATCH --job-name=tiny\n#SBATCH --nodes=1-3\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("profile", "words", "message"),
    [
        ("transport: local", ["--nodes", "2"], "--nodes 2: transport: local is one node"),
        ("transport: local", ["--chain", "2"], "--chain 2 is for transport: slurm"),
        (
            "transport: local\npass_environment: [NOT_SET_A, NOT_SET_B]",
            [],
            "names NOT_SET_A, NOT_SET_B, which is not set",
        ),
        ("transport: slurm\nslurm: {}", [], "procs_per_node is missing"),
        ("transport: local\ncontainer: [docker, run, img]", [], "container: docker does not pass on standard input"),
        ("transport: ssh\nhosts: {file: hosts}", ["--nodes", "4"], "4 nodes are asked for, and hosts has 3"),
        ("transport: ssh\nhosts: {file: hosts}", ["--procs-per-node", "3"], "node1 has 2"),
        (
            "transport: ssh\nhosts: {file: hosts}\nnodes: 3",
            ["data.lanes=4"],
            "6 ranks cannot train tiny: data.lanes=4 is the most; use 1 to 4 ranks",
        ),
        ("transport: ssh\nhosts: {file: nowhere}", [], "nowhere: cannot be read"),
        (
            "transport: ssh\nhosts: {file: hosts, launcher: pdsh}",
            [],
            "launcher=pdsh: pdsh is not on this machine",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    arguments: Callable[..., Namespace],
    profile: str,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as error:
        run_command(arguments(profile, *words))
    assert message in str(error.value)
    assert not Path("runs").exists()


def test_options_of_profiles_need_one() -> None:
    with pytest.raises(UserError, match="--nodes needs a profile"):
        run_command(parse(["run", "tiny.yaml", "--nodes", "2"]))


def test_overrides_of_the_command_line_win_over_the_profiles(arguments: Callable[..., Namespace]) -> None:
    profile = "transport: local\noverrides: [train.micro_batch_rows=1, log.every_steps=1]\n"
    assert printed(arguments(profile, "--dry-run")).startswith("# 1 rank × 1 rows × 8 accumulation")
    again = arguments(profile, "train.micro_batch_rows=4", "--dry-run")
    assert printed(again).startswith("# 1 rank × 4 rows × 2 accumulation")


def test_as_many_nodes_are_taken_as_there_are_rows_for(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("data.lanes=4")
    assert [usable_nodes(recipe, 1, 1, most) for most in (1, 3, 5)] == [1, 3, 4]
    assert usable_nodes(recipe, 3, 1, 5) == 1
    with pytest.raises(UserError, match=r"5 ranks cannot train tiny: data\.lanes=4 is the most; use 1 to 4 ranks"):
        usable_nodes(recipe, 1, 5, 9)
    hosts = [Host(name, 1) for name in "abcdef"]
    assert choose_hosts(hosts[:3], recipe, (1, 9), None) == (["a", "b", "c"], 1)
    assert choose_hosts(hosts, recipe, (1, 9), None) == (["a", "b", "c", "d"], 1)
    with pytest.raises(UserError, match=r"different numbers of slots \(a 1, b 2\); say --procs-per-node"):
        choose_hosts([Host("a", 1), Host("b", 2)], recipe, (2, 2), None)


def test_a_run_goes_on_without_a_host_where_enough_are_left(tmp_path: Path) -> None:
    settings = NodeSettings(tmp_path, "python", {})
    job = Job("tiny", tmp_path, 1, cluster=Cluster("ssh", ("a", "b"), settings), node_range=(1, 2), spare_hosts=("c",))

    def hosts(job: Job | None) -> tuple[str, ...] | None:
        return None if job is None or job.cluster is None else job.cluster.hosts

    without_b = job.without("b")
    assert hosts(without_b) == ("a", "c")  # the spare one stands in
    assert without_b is not None and without_b.spare_hosts == ()
    without_a = without_b.without("a")
    assert hosts(without_a) == ("c",)
    assert without_a is not None and without_a.without("c") is None  # none is left
    assert replace(job, node_range=(2, 2), spare_hosts=()).without("b") is None  # too few are
    assert job.without("z") is None
    assert spare_hosts([Host("a", 2), Host("b", 1), Host("c", 2)], ["a"], 2) == ("c",)
