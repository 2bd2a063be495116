from pathlib import Path

import pytest

from dstrain.errors import UserError
from dstrain.transport.hostfile import Host, parse_hostfile, read_hostfile, select
from dstrain.transport.profile import load_profile, parse_nodes

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "launch").glob("*.yaml"))
HOSTFILES = sorted((ROOT / "hostfiles").glob("*.txt"))

WRONG = """\
transport: slrm
nods: 3
nodes: 4-2
procs_per_node: "8"
slurm:
  partiton: a
  time: tomorrow
  account: a b
  extra: [--nodes=3, -p, --qos=3]
environment: {A_TOKEN: x, B: 1, "a b": c, TOKENIZERS_PARALLELISM: "false"}
pass_environment: [A=3]
network: {rendezvous_port: 10}
venv: ""
container: ["two\\nlines"]
"""


def test_all_mistakes_are_reported_together_with_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(WRONG)
    with pytest.raises(UserError) as error:
        load_profile("p.yaml")
    assert str(error.value) == (
        """\
p.yaml:1: transport=slrm is not one of local, pdsh, slurm, ssh; use slurm
p.yaml:2: nods is an unknown key; did you mean nodes?
p.yaml:3: nodes=4-2 is neither a number nor a range; write 4 or 2-4
p.yaml:4: procs_per_node="8" is text and must be a whole number; remove the quotes: 8
p.yaml:6: slurm.partiton is an unknown key; did you mean slurm.partition?
p.yaml:7: slurm.time=tomorrow is not a time of SLURM; write 24:00:00 or 2-00:00:00
p.yaml:8: slurm.account=a b has a space, a quote or one of \\ # $ ` in it, which `#SBATCH` cannot hold
p.yaml:9: slurm.extra has --nodes, which is set already; delete it
p.yaml:9: slurm.extra has --qos, which has a key of its own; write slurm.qos
p.yaml:9: slurm.extra has -p; write whole long options, as in --mem=0
p.yaml:10: environment.A_TOKEN looks like a secret; set it in your shell and name it in pass_environment, which \
never writes the value to disk
p.yaml:10: environment.B=1 must be text; write it in quotes: "1"
p.yaml:10: environment.a b is not a name of a variable; use letters, digits and _
p.yaml:11: pass_environment has A=3, which is not a name of a variable; write names only; the values come from the \
submitting shell
p.yaml:12: network.rendezvous_port=10 must be at least 1024; change the value
p.yaml:13: venv="" is empty; write a value or delete the key
p.yaml:14: container="two\\nlines" has a line break or another control character; remove it"""
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "transport: local\nhosts: {file: a}",
            "p.yaml:2: hosts is for transport: pdsh or ssh, and this is local; delete it",
        ),
        ("transport: ssh", "p.yaml:1: transport: ssh needs hosts; add `hosts: {file: …}`"),
        ("transport: local\nnodes: 2", "p.yaml:2: nodes=2: transport: local is one node; use ssh or slurm"),
        ("nodes: 1", "p.yaml:1: transport is missing; add one of local, pdsh, slurm, ssh"),
        ("transport: ssh\nhosts: 3", "p.yaml:2: hosts=3 must be a section; write its keys below it, indented"),
        ("- a", "p.yaml:1: a profile is a mapping; write `key: value` lines, beginning with `transport:`"),
        ("transport: local\nnodes: 0", "p.yaml:2: nodes=0 is neither a number nor a range; write 4 or 2-4"),
        ("transport: local\nnodes: true", "p.yaml:2: nodes=true is neither a number nor a range; write 4 or 2-4"),
    ],
)
def test_each_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_profile("p.yaml")
    assert str(error.value).splitlines()[0].startswith(sentence)


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.yaml: cannot be read: No such file or directory; launch/ has profiles"):
        load_profile(tmp_path / "p.yaml")


def test_the_profiles_that_come_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    transports = {file.stem: load_profile(file).transport for file in PROFILES}
    assert transports == {"debug": "local", "hostfile": "ssh", "local": "local", "slurm": "slurm"}
    hosts = load_profile("launch/hostfile.yaml").hosts
    assert hosts is not None
    assert len(read_hostfile(Path(hosts.file))) == 2


def test_ranges_of_nodes() -> None:
    assert parse_nodes(3) == (3, 3)
    assert parse_nodes("2-16") == (2, 16)


def test_the_host_files_that_come_with_it() -> None:
    assert len(HOSTFILES) == 2
    assert read_hostfile(ROOT / "hostfiles/two-nodes.txt") == (Host("node1", 8), Host("node2", 8))
    assert [host.name for host in read_hostfile(ROOT / "hostfiles/user-and-address.txt")] == [
        "train@10.0.0.11",
        "train@10.0.0.12",
    ]


def test_a_host_file_reports_all_its_mistakes() -> None:
    text = "# ours\nnode1 slots=2\nnode2\n-oProxyCommand=sh slots=1\nnode1 slots=4\nnode3 slots=0\na;b slots=1\n"
    with pytest.raises(UserError) as error:
        parse_hostfile(text, "hosts")
    assert str(error.value).splitlines() == [
        "hosts:3: 'node2' is not `host slots=n` with n of at least 1",
        "hosts:4: '-oProxyCommand=sh' is not a host's name; write it as ssh takes it",
        "hosts:5: node1 is already on line 2; delete one of the two",
        "hosts:6: 'node3 slots=0' is not `host slots=n` with n of at least 1",
        "hosts:7: 'a;b' is not a host's name; write it as ssh takes it",
    ]
    with pytest.raises(UserError, match="there is no host in it"):
        parse_hostfile("\n# none\n", "hosts")


def test_filters() -> None:
    hosts = parse_hostfile("node1 slots=2\nnode2 slots=2\nnode3 slots=2", "hosts")
    assert [host.name for host in select(hosts, (), ("node2",))] == ["node1", "node3"]
    assert [host.name for host in select(hosts, ("node3", "node1"), ())] == ["node1", "node3"]
    with pytest.raises(UserError, match=r"hosts\.exclude has nod4, which is not in the host file; did you mean node"):
        select(hosts, (), ("nod4",))
    with pytest.raises(UserError, match="leave no host"):
        select(hosts, ("node1",), ("node1",))
