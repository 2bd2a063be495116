"""`dstrain doctor`: the lint of profiles, the judgement of speeds, and the command itself on this machine."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.doctor.bench import rounds
from dstrain.doctor.command import measure
from dstrain.doctor.speeds import RankSpeed, judge_speeds, links
from dstrain.preflight.lint import Durations, lint
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.transport.command import Job
from dstrain.transport.profile import Profile, profile_model
from dstrain.transports.slurm import TRANSPORT, Slurm

pytestmark = pytest.mark.slow

MEASURED = Durations(2.0, 40.0, are_measured=True)

SlurmProfile = profile_model(TRANSPORT)


def linted(
    profile: Profile, durations: Durations | None = None, timeout: int = 600, wait: int | None = None
) -> list[str]:
    shell = {"HOME": "/home/you", "PATH": "/bin"}
    return [f"{found.level}: {found}" for found in lint(profile, shell, timeout, durations, wait)]


def local(**keys: Any) -> Profile:
    return Profile(transport="local", **keys)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (
            local(container=("docker", "run", "--env", "DSTRAIN_ATTEMPT", "img")),
            "error: container: docker does not pass on standard input",
        ),
        (local(container=("docker", "run", "-i", "img")), "error: container: docker does not pass on DSTRAIN_ATTEMPT"),
        (
            local(container=("apptainer", "exec", "-C", "img.sif")),
            "error: container: apptainer -C does not pass on DST",
        ),
        (
            local(container=("bash", "-c", "module load x")),
            "error: container: bash -c does not run the words that come",
        ),
        (local(container=("sh", "-c", '"$0" "$@"')), "warning: container: sh -c stays between the agent and its sign"),
        (local(container=("enroot", "start", "img.sqsh")), "error: container: enroot does not pass on DSTRAIN_ATTEMPT"),
        (local(container=("sudo", "-u", "you")), "error: container: sudo passes on no variable; add -E"),
        (local(environment={"HF_HOME": "$HOME/hf"}), "warning: environment.HF_HOME='$HOME/hf' is taken literally"),
        (local(environment={"A": "'b'"}), "warning: environment.A=\"'b'\" has quotes inside its value"),
    ],
)
def test_what_a_profile_cannot_keep(profile: Profile, words: str) -> None:
    (found,) = linted(profile)
    assert found.startswith(words)


def test_words_of_containers_that_are_right() -> None:
    for container in (
        ("docker", "run", "-i", "--env", "DSTRAIN_ATTEMPT", "img"),
        ("podman", "run", "--interactive", "--env-host", "img"),
        ("apptainer", "exec", "--nv", "img.sif"),
        ("enroot", "start", "--conf", "/shared/all-variables.conf", "img.sqsh"),
        ("enroot", "start", "--env", "DSTRAIN_ATTEMPT", "img.sqsh"),
        ("bash", "-c", 'ulimit -n 65536; exec "$0" "$@"'),
        ("sudo", "-E"),
    ):
        assert linted(local(container=container)) == [
            "ok: ranks have 600 s for their last step and save (not measured yet)"
        ]


def test_time_that_is_too_short() -> None:
    (found,) = linted(local(), MEASURED, timeout=30)
    assert found == (
        "error: ranks are killed 30 s after the word to stop, and a step and a save took 42 s; "
        "set shutdown_timeout_seconds to at least 84"
    )
    assert "will take about 42 s" in linted(local(), Durations(2.0, 40.0, are_measured=False), timeout=30)[0]
    slurm = SlurmProfile(transport="slurm", slurm=Slurm(time="2"))
    limit, wait = linted(slurm, MEASURED, wait=30)
    assert limit.startswith("error: a third of slurm.time (40 s) is kept for the end, and a step and a save took 42 s")
    assert wait.startswith("warning: SLURM kills 30 s after `scancel` or preemption (KillWait)")
    assert [
        words[:2] for words in linted(SlurmProfile(transport="slurm", slurm=Slurm(time="10")), MEASURED, wait=60)
    ] == ["ok"]


def test_variables_of_this_shell_that_ranks_will_not_see() -> None:
    shell = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "HF_HOME": "/hf", "LANG": "C"}
    profile = local(environment={"OMP_NUM_THREADS": "4"}, pass_environment=("HF_HOME",))
    (found,) = lint(profile, shell, 600, None)
    assert str(found).startswith("NCCL_DEBUG is set in this shell and will not reach the ranks; name what they need")
    assert found.level == "warning"


# ---------------------------------------------------------------- speeds


@given(st.integers(1, 24))
def test_every_pair_of_nodes_is_measured_once_and_no_node_twice_at_a_time(nodes: int) -> None:
    found = rounds(nodes)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(nodes), 2))
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in found)
    assert len(found) == max(0, nodes - 1 + nodes % 2)


def speeds(gemm: list[float], pairs: dict[tuple[int, int], float]) -> list[RankSpeed]:
    of_node: dict[int, dict[int, float]] = {node: {} for node in range(len(gemm))}
    for (first, second), speed in pairs.items():
        of_node[first][second] = speed
        of_node[second][first] = speed * 1.1  # the other side's clock
    return [RankSpeed(n, n, f"node{n + 1}", "cpu", flops, of_node[n]) for n, flops in enumerate(gemm)]


def test_speeds_that_agree_are_a_range() -> None:
    found = speeds([1e12, 1.1e12, 1e12], {(0, 1): 1e9, (0, 2): 1.2e9, (1, 2): 9e8})
    assert [str(finding) for finding in judge_speeds(found, "bf16")] == [
        "1.0 TFLOP/s to 1.1 TFLOP/s bf16 of each rank (cpu)",
        "900 MB/s to 1.2 GB/s between any two of 3 nodes (3 pairs)",
    ]
    assert links(found)[0, 2] == 1.2e9


def test_devices_that_torch_does_not_see() -> None:
    found = judge_speeds(speeds([1e12, 1e12], {(0, 1): 1e9}), "bf16", with_devices={1})
    errors = [str(finding) for finding in found if finding.level == "error"]
    assert len(errors) == 1 and errors[0].startswith("node2: has devices that torch does not see")


def test_a_slow_rank_and_a_slow_link_are_named() -> None:
    pairs = dict.fromkeys(combinations(range(4), 2), 1e9) | {(1, 3): 1e8}
    gemm, link = judge_speeds(speeds([1e12, 1e12, 5e11, 1e12], pairs), "fp32")
    assert str(gemm).startswith("node3: rank 2 makes 500 GFLOP/s fp32, the others 1.0 TFLOP/s; look for other programs")
    assert str(link).startswith("node2: the link to node4 makes 100 MB/s, others 1.0 GB/s; look at its cable")
    assert {gemm.level, link.level} == {"warning"}


def test_one_slow_node_of_three_is_found() -> None:
    _, link = judge_speeds(speeds([1e12] * 3, {(0, 1): 1e9, (0, 2): 1e8, (1, 2): 1e8}), "fp32")
    assert str(link).startswith("node3: all of its 2 links are slow: 100 MB/s")


def test_a_node_whose_links_are_all_slow_is_named_once() -> None:
    pairs = {pair: 1e8 if 2 in pair else 1e9 for pair in combinations(range(5), 2)}
    _, link = judge_speeds(speeds([1e12] * 5, pairs), "fp32")
    assert str(link).startswith(
        "node3: all of its 4 links are slow: 100 MB/s, a quarter of all pairs make 1.0 GB/s or more"
    )


# ---------------------------------------------------------------- the command


def doctor(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dstrain", "doctor", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_two_ranks_of_this_machine_are_examined_and_measured(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(tiny_recipe()))
    (tmp_path / "here.yaml").write_text('transport: local\nenvironment: {OMP_NUM_THREADS: "1"}\n')
    done = doctor(tmp_path, "tiny.yaml", "--on", "here.yaml", "--procs-per-node", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["safe"] and result["seconds"] < 60
    assert result["title"] == "tiny.yaml on here.yaml: 1 node × 2 ranks"
    texts = {finding["check"]: finding["text"] for finding in result["findings"] if finding["level"] == "ok"}
    assert texts["batch"] == "2 ranks × 2 rows × 2 accumulation = 8 rows = 256 tokens"
    assert "among the ranks of the node" in texts["all-reduce"]
    assert all(speed > 1e9 for speed in result["gemm_flops_per_second"].values())
    assert len(result["gemm_flops_per_second"]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here.yaml", "tiny.yaml"]


def test_what_is_wrong_is_in_the_table_and_in_the_exit_code(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(tiny_recipe()).replace("tokenizer: ", "tokenizer: /nowhere"))
    too_many = ("checkpoint.keep_last=100000000", "checkpoint.every_steps=1", "train.steps=1000000000")
    done = doctor(tmp_path, "tiny.yaml", *too_many, "--procs-per-node", "9", "--quick")
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    errors = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  ERROR")]
    assert [line.split()[0] for line in errors] == ["batch", "files", "room"]
    assert "9 ranks cannot train tiny: data.lanes=8 is the most" in errors[0]
    assert "→ use 1 to 8 ranks, or more lanes" in done.stdout
    assert lines[-1].startswith("NOT safe to start (3 errors); took ")


def test_ranks_that_cannot_be_measured_are_an_error(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    (tmp_path / "here.yaml").write_text("transport: local\nenvironment: {GLOO_SOCKET_IFNAME: nowhere0}\n")
    done = doctor(tmp_path, "--on", "here.yaml", "--procs-per-node", "2", "--json")
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = [finding for finding in json.loads(done.stdout)["findings"] if finding["level"] == "error"]
    assert error["check"] == "speed" and "failed" in error["text"] and "nowhere0" in error["text"], error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here.yaml"]


def test_ranks_that_do_not_find_each_other_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.doctor.command.MEASURING_SECONDS", 0.3)  # in which no rank can even import torch
    speeds, (finding,) = measure(Job("doctor", tmp_path / "run", 2), None, set())
    assert speeds == [] and (finding.check, finding.level) == ("speed", "error")
    assert finding.text == "0 of 2 ranks have started and did not find each other in 0 s"
    assert list((tmp_path / "run").iterdir()) == []
