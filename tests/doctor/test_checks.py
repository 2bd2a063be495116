"""What `dstrain doctor`, and every start, makes of the facts of nodes; and the probe that gathers them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.shards import Corpus
from dstrain.errors import UserError
from dstrain.preflight.ask import Answer
from dstrain.preflight.checks import CHECKS, Finding, Nodes, Wanted, judge
from dstrain.preflight.preflight import check_launch, room_needed
from dstrain.preflight.probe import Facts, Questions, facts, heard, said
from dstrain.recipe.schema import Recipe
from dstrain.transport.command import Job

SOUND = Facts(
    host="node1",
    code="c0de",
    versions={"python": "3.12.1", "torch": "2.9.0", "deepspeed": "0.18.0", "transformers": "5.0.0"},
    time_unix=1000.0,
    missing=[],
    token="t",
    unwritable=None,
    file_system="nfs4",
    free_bytes=10**12,
    free_files=10**6,
    shm_free_bytes=2**34,
    limits={"open files": 65536, "processes": 65536, "locked memory": None},
    cores=8,
    devices=["NVIDIA H100"] * 8,
    visible_devices=8,
    has_infiniband=True,
    interfaces={"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    own_addresses=["10.0.0.1"],
    first_addresses=["10.0.0.1"],
    busy_port=None,
    environment={},
    corpora={"corpus": "d16e57"},
    bytes_per_second=1e9,
)
TOO_MANY_CHECKPOINTS = ("checkpoint.keep_last=100000000", "checkpoint.every_steps=1", "train.steps=1000000000")
TWO = Wanted("ssh", nodes=2, ranks=8, room_bytes=10**9)


def answer(host: str, facts: Facts | None, exit_code: int = 0, words: str = "") -> Answer:
    return Answer(host, facts, exit_code, words, 999.0, 1001.0)


def problems(changes: dict[str, Any], wanted: Wanted = TWO) -> list[Finding]:
    """What is found when the second of two nodes differs in this."""
    second = replace(SOUND, host="node2", **changes)
    found = judge(Nodes([answer("node1", SOUND), answer("node2", second)], SOUND, wanted))
    return [finding for finding in found if finding.level != "ok"]


def test_sound_nodes_give_one_line_for_each_check() -> None:
    found = judge(Nodes([answer("node1", SOUND), answer("node2", replace(SOUND, host="node2"))], SOUND, TWO))
    assert [(finding.check, finding.level) for finding in found] == [(check.name, "ok") for check in CHECKS]
    shown = dict((finding.check, str(finding)) for finding in found)
    assert shown["versions"] == "dstrain c0de, python 3.12.1, torch 2.9.0, deepspeed 0.18.0, transformers 5.0.0"
    assert shown["devices"] == "8 of NVIDIA H100 on each node"
    assert shown["room"] == "1.0 TB free, 1.0 GB needed for checkpoints"
    assert shown["run folder"] == "shared and writable (nfs4, 1,000 MB/s written by each node at once)"
    assert shown["files"] == "the recipe's files are there; corpora d16e57"


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"code": "ff"}, "error", "has other code of dstrain (ff, here c0de); install the same version"),
        ({"versions": SOUND.versions | {"torch": None}}, "error", "has torch none, here it is 2.9.0"),
        ({"time_unix": 940.0}, "error", "its clock is off by -60 s"),
        ({"visible_devices": 4}, "error", "8 ranks are to share 4 devices; say --procs-per-node 4"),
        ({"missing": ["/data"]}, "error", "/data is missing, empty or not readable"),
        ({"corpora": {"corpus": "error: no shards"}}, "error", "cannot read corpus: no shards"),
        ({"corpora": {"corpus": "0ther"}}, "error", "corpus is another corpus there (digest 0ther, here d16e57)"),
        ({"token": None}, "error", "does not see the run's folder as this machine does"),
        ({"unwritable": "Read-only file system"}, "error", "cannot write into the run's folder: Read-only"),
        ({"free_bytes": 10**8}, "error", "100.0 MB are free, the checkpoints to come need 1.0 GB"),
        ({"free_bytes": 10**10, "free_files": 3}, "error", "only 3 more files fit on its disk"),
        ({"shm_free_bytes": 2**20}, "error", "/dev/shm has 1.0 MB left for 8 ranks"),
        ({"shm_free_bytes": 2**26}, "warning", "/dev/shm has 67.1 MB left for 8 ranks"),
        ({"shm_free_bytes": None}, "warning", "there is no /dev/shm"),
        ({"limits": SOUND.limits | {"open files": 128}}, "error", "only 128 open files (ulimit -n); 1024 are wanted"),
        ({"limits": SOUND.limits | {"open files": 512}}, "warning", "only 512 open files"),
        ({"limits": SOUND.limits | {"processes": 100}}, "error", "only 100 processes (ulimit -u); 2048 are wanted"),
        ({"limits": SOUND.limits | {"locked memory": 8192}}, "warning", "may lock only 8,192 bytes of memory"),
        ({"first_addresses": []}, "error", "does not know node1, where all ranks meet"),
        ({"first_addresses": ["127.0.1.1"]}, "error", "takes node1, where all ranks meet, for itself (127.0.1.1)"),
        ({"own_addresses": ["127.0.1.1"]}, "error", "its own name node2 leads to 127.0.1.1"),
        ({"own_addresses": []}, "error", "its own name node2 is unknown there"),
    ],
)
def test_what_is_wrong_is_named_with_its_host(changes: dict[str, Any], level: str, words: str) -> None:
    (found,) = problems(changes)
    assert found.level == level
    assert str(found).startswith("node2: ") and words in str(found), str(found)
    assert found.remedy


def test_different_devices_are_a_warning_about_all() -> None:
    (found,) = problems({"devices": ["NVIDIA A100"] * 8})
    assert (found.level, found.host) == ("warning", None)
    assert "node1 NVIDIA H100; node2 NVIDIA A100" in found.text


def test_a_named_interface_has_to_be_there_and_makes_names_unimportant() -> None:
    named = replace(TWO, interface="eth")
    assert problems({"own_addresses": ["127.0.1.1"]}, named) == []
    (found,) = problems({"interfaces": {"lo": "127.0.0.1", "ib0": "10.0.0.2"}}, named)
    assert str(found) == "node2: has no interface eth, it has lo, ib0; correct network.interface"
    both = problems({}, replace(TWO, interface="lo"))
    assert [str(found).partition(";")[0] for found in both] == [
        "node1: interface lo leads to no other node",
        "node2: interface lo leads to no other node",
    ]
    (found,) = problems({"interfaces": {"eth0": None}}, named)
    assert found.level == "warning"


def test_a_busy_port_matters_where_it_is_fixed() -> None:
    for fixed, level in ((True, "error"), (False, "warning")):
        first = replace(SOUND, busy_port="port 29500 is in use")
        found = judge(Nodes([answer("node1", first)], SOUND, replace(TWO, port_is_fixed=fixed)))
        assert [(f.check, f.level) for f in found if f.level != "ok"] == [("port", level)]


def test_neither_names_nor_ports_matter_to_a_single_node() -> None:
    alone = replace(SOUND, own_addresses=[], first_addresses=[])
    found = judge(Nodes([answer("node1", alone)], SOUND, Wanted(ranks=1)))
    assert {finding.level for finding in found} == {"ok"}


def test_hosts_that_do_not_answer() -> None:
    silent = [answer("a", None, 255, "No route to host"), answer("b", None, 127, "no such file")]
    first, second = judge(Nodes(silent, SOUND, TWO))
    assert str(first) == "a: cannot be reached: No route to host; try `ssh a true`; it must work without a question"
    assert "python does not run there: no such file" in str(second)
    (other,) = judge(Nodes(silent[:1], SOUND, replace(TWO, transport="slurm")))
    assert "does not run there" in other.text  # 255 means nothing to srun


def test_libraries_in_a_container_are_compared_with_each_other() -> None:
    inside = replace(SOUND, versions=SOUND.versions | {"torch": "2.8.0"})
    nodes = [answer("node1", inside), answer("node2", replace(inside, host="node2"))]
    contained = replace(TWO, in_container=True)
    assert {finding.level for finding in judge(Nodes(nodes, SOUND, contained))} == {"ok"}
    nodes[1] = answer("node2", SOUND)
    (found,) = [finding for finding in judge(Nodes(nodes, SOUND, contained)) if finding.level != "ok"]
    assert str(found).startswith("node2: has torch 2.9.0, node1 it is 2.8.0")


def some_facts() -> st.SearchStrategy[Facts]:
    sizes = st.integers(0, 2**45)
    limit = st.none() | st.integers(0, 10**6)
    words = st.lists(st.text(max_size=8), max_size=3)
    return st.builds(
        Facts,
        host=st.sampled_from(["node1", "node2"]),
        code=st.sampled_from(["c0de", "ff"]),
        versions=st.fixed_dictionaries({name: st.none() | st.just("1") for name in SOUND.versions}),
        time_unix=st.floats(0, 2000),
        missing=words,
        token=st.none() | st.just("t"),
        unwritable=st.none() | st.text(min_size=1, max_size=5),
        file_system=st.sampled_from(["nfs", "tmpfs"]),
        free_bytes=sizes,
        free_files=st.none() | sizes,
        shm_free_bytes=st.none() | sizes,
        limits=st.fixed_dictionaries(dict.fromkeys(SOUND.limits, limit)),
        cores=st.integers(1, 9),
        devices=st.lists(st.sampled_from(["A", "B"]), max_size=3),
        visible_devices=st.integers(0, 9),
        has_infiniband=st.booleans(),
        interfaces=st.dictionaries(st.sampled_from(["lo", "eth0"]), st.none() | st.just("10.0.0.1")),
        own_addresses=st.lists(st.sampled_from(["127.0.1.1", "10.0.0.1", "::1"]), max_size=2),
        first_addresses=st.lists(st.sampled_from(["127.0.1.1", "10.0.0.1"]), max_size=2),
        busy_port=st.none() | st.just("port 1 is in use"),
        environment=st.just({}),
    )


@given(st.lists(st.none() | some_facts(), min_size=1, max_size=3), some_facts(), st.integers(1, 3))
@pytest.mark.slow
def test_whatever_the_facts_each_check_says_something_and_problems_have_a_remedy(
    nodes: list[Facts | None], here: Facts, count: int
) -> None:
    answers = [answer(f"node{number}", found) for number, found in enumerate(nodes)]
    found = judge(Nodes(answers, here, Wanted("slurm", nodes=count)))
    expected = {check.name for check in CHECKS} if any(nodes) else {"nodes"}
    assert {finding.check for finding in found} == expected
    assert all(finding.text and (finding.level == "ok" or finding.remedy) for finding in found)
    for name in expected:
        levels = [finding.level for finding in found if finding.check == name]
        assert levels == ["ok"] or "ok" not in levels
    assert json.loads(json.dumps([finding.as_json() for finding in found]))


# ---------------------------------------------------------------- the probe, and the short form


def test_the_probes_answer_is_a_line_among_others_and_takes_no_torch(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("here")
    (tmp_path / "unmounted").mkdir()
    asked = ("/", "/nowhere", str(tmp_path / "unmounted"), str(tmp_path / "token"))
    questions = Questions(str(tmp_path), str(tmp_path / "token"), asked, (("corpus", "text"),), "localhost")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dstrain.preflight.probe", questions.as_word(), "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    ((node, there),) = heard(done.stdout).items()
    assert (node, there.missing, there.token) == (3, ["/nowhere", asked[2]], "here")
    assert there.host == socket.gethostname() and there.unwritable is None and there.free_bytes > 0
    assert there.first_addresses and there.interfaces["lo"] == "127.0.0.1"
    assert there.corpora == {} and there.bytes_per_second is None  # of the long form
    assert not any(f"| {name}\n" in done.stderr.replace("|   ", "| ") for name in ("torch", "numpy"))
    assert sorted(os.listdir(tmp_path)) == ["token", "unmounted"]  # noqa: PTH208


def test_the_long_form_reads_corpora_and_measures_the_disk(tmp_path: Path, tiny_corpus: Path) -> None:
    train = str(tiny_corpus / "train")
    missing, truncated = str(tmp_path / "nowhere"), shutil.copytree(tiny_corpus / "train", tmp_path / "truncated")
    shard = sorted(truncated.glob("*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[:-512])
    locations = (train, missing, str(truncated))
    asked = Questions(str(tmp_path), "", (), tuple((location, "text") for location in locations), is_long=True)
    found = facts(asked)
    assert found.corpora[train] == Corpus.open(train).digest
    assert found.corpora[missing].startswith("error: ")
    assert found.corpora[str(truncated)].startswith(f"error: {shard}: {shard.stat().st_size} bytes, but its index")
    assert found.bytes_per_second is not None and found.bytes_per_second > 0


def test_a_port_that_somebody_listens_on_is_busy(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        asked = Questions(str(tmp_path), "", port=port)
        assert facts(asked, node=0).busy_port == f"port {port} is in use"
        assert facts(asked, node=1).busy_port is None  # which does not listen
    assert facts(asked).busy_port is None


def test_a_start_without_room_for_the_checkpoints_is_refused(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe("checkpoint.keep_last=2", "checkpoint.every_steps=10")
    one = room_needed(recipe, 2)
    assert [room_needed(recipe, there) for there in range(5)] == [3 * one, 2 * one, one, one, one]
    job = Job("tiny", tmp_path, 1)
    began = time.process_time()
    assert check_launch(job, recipe) == job
    assert time.process_time() - began < 0.5  # 0.04 by the clock, on an idle machine
    with pytest.raises(UserError, match=r"are free, the checkpoints to come need [\d.]+ TB; make room"):
        check_launch(job, tiny_recipe(*TOO_MANY_CHECKPOINTS))
    assert list(tmp_path.iterdir()) == []


def test_facts_travel_in_short_lines_among_others() -> None:
    spaced = replace(SOUND, missing=["/a  b", " " * 2000, "ü\n"])
    lines = {node: list(said(spaced, node)) for node in (0, 11)}
    mixed = [f"{node}: {line}" for pair in zip(*lines.values(), strict=True) for node, line in enumerate(pair)]
    assert heard("\n".join(["Welcome", *mixed, "bye"])) == {0: spaced, 11: spaced}
    assert max(map(len, mixed)) < 450
    questions = Questions("/run", "/run/t", ("a b",), (("c", "text"),), "node1", 29_500, is_long=True)
    assert Questions.of_word(questions.as_word()) == questions
