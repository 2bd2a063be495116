"""A launch profile says where a recipe is trained: over which transport, on which nodes, in which environment.

Strict as recipes are: unknown keys, wrong types and contradictions are reported together, each with file and line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, StringConstraints, ValidationError

from dstrain.base.environment import is_secret_name
from dstrain.base.section import PositiveInt, Section
from dstrain.errors import UserError
from dstrain.recipe.messages import given, unknown_key, wrong_value
from dstrain.recipe.source import Node, Place, Problem, parse_yaml
from dstrain.transport.node_script import LOST_AFTER_SECONDS

Text = Annotated[str, StringConstraints(min_length=1)]
# Stands in a `#SBATCH` line, which has no quoting that is the same in all versions of SLURM.
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\"'\\#$`]+$")]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RANGE = re.compile(r"([1-9][0-9]*)-([1-9][0-9]*)")
_NODES_RULE = "is neither a number nor a range; write 4 or 2-4"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
# Options that `dstrain` sets itself; given twice, which one wins would depend on SLURM.
_OWN_OPTIONS: tuple[str, ...] = (
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--signal",
    "--export",
    "--output",
    "--error",
    "--chdir",
)
_OWN_OPTIONS += ("--job-name", "--requeue", "--no-requeue", "--open-mode", "--dependency", "--array", "--wrap")


class Hosts(Section):
    """Which machines `transport: ssh` uses: those of a host file, in its order."""

    file: Text
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()
    launcher: Literal["auto", "pdsh", "openssh"] = "auto"  # auto: pdsh where it is installed


class Slurm(Section):
    """What `sbatch` is told; each key is the option of that name, and null leaves it to the cluster."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Word | None = None
    gres: Word | None = None
    cpus_per_task: PositiveInt | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    mail_user: Word | None = None
    mail_type: Word | None = None
    reservation: Word | None = None
    requeue: bool = True
    extra: tuple[Word, ...] = ()


class Network(Section):
    """How ranks on different nodes find each other."""

    interface: Text | None = None
    rendezvous_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    lost_after_seconds: Annotated[int, Field(ge=6, le=3600)] = LOST_AFTER_SECONDS  # ssh: a host that is silent is lost


class Debug(Section):
    """A debug run in place of a real one, in this terminal; see `dstrain.supervise.debugging`."""

    steps: PositiveInt = 5  # unless the command line has another length
    detect_anomaly: bool = True  # torch's: the operation whose gradient is not finite is named


class Profile(Section):
    """Every key of a profile. Paths are those of the nodes; relative ones start in the folder of the command."""

    transport: Literal["local", "ssh", "slurm"]
    nodes: int | str = 1
    procs_per_node: PositiveInt | None = None
    hosts: Hosts | None = None
    slurm: Slurm | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    pass_environment: tuple[str, ...] = ()
    modules: tuple[Text, ...] = ()
    venv: Text | None = None
    container: tuple[Text, ...] = ()
    network: Network = Network()
    shutdown_timeout_seconds: PositiveInt | None = None
    on_hang: Literal["restart", "stop"] = "restart"  # a rank that stands still: go on from the checkpoint, or end
    overrides: tuple[Text, ...] = ()
    debug: Debug | None = None

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        return parse_nodes(self.nodes)

    def with_overrides(self, given: Sequence[str]) -> list[str]:
        """The profile's overrides and those of a command line, which win where both have a key."""
        keys = {override.partition("=")[0] for override in given}
        return [*(override for override in self.overrides if override.partition("=")[0] not in keys), *given]


def parse_nodes(given_nodes: int | str) -> tuple[int, int]:
    """`4` or `2-4` as (fewest, most).

    Raises:
        UserError: it is neither.
    """
    match = _RANGE.fullmatch(str(given_nodes))
    fewest, most = (int(match[1]), int(match[2])) if match else (0, 0)
    if not match and str(given_nodes).isdecimal():
        fewest = most = int(given_nodes)
    if not 1 <= fewest <= most:
        raise UserError(f"nodes={given_nodes} {_NODES_RULE}")
    return fewest, most


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises:
        UserError: one line for each mistake: file:line, what was given, which rule it broke, what to do.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; launch/ has profiles to begin with") from None
    tree, problems = parse_yaml(text, Place(str(path), 1))
    if not isinstance(tree.value, dict):
        raise UserError(f"{path}:1: a profile is a mapping; write `key: value` lines, beginning with `transport:`")
    tree = _without_null(tree)
    profile: Profile | None = None
    try:
        profile = Profile.model_validate_json(json.dumps(tree.plain()))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            location = [str(step) for step in details["loc"] if isinstance(step, str) and step not in ("int", "str")]
            problems.append(_type_problem(tree, location, cast(dict[str, Any], details)))
    problems += _rule_problems(tree)
    if problems:
        ordered = sorted(set(problems), key=lambda problem: (problem.place.line or 0, problem.text))
        raise UserError("\n".join(str(problem) for problem in ordered))
    assert profile is not None
    return profile


# ---------------------------------------------------------------- from findings to problems


def _without_null(tree: Node) -> Node:
    """Keys that are null have their default."""
    if not isinstance(tree.value, dict):
        return tree
    kept = {key: _without_null(node) for key, node in tree.value.items() if node.value is not None}
    return Node(kept, tree.place)


def _type_problem(tree: Node, location: list[str], details: dict[str, Any]) -> Problem:
    path, kind = ".".join(location), details["type"]
    node, place = _find(tree, location)
    if node is None:
        remedy = f"; add one of {', '.join(get_args(Profile.model_fields['transport'].annotation))}"
        return Problem(place, f"{path} is missing{remedy if path == 'transport' else '; add it'}")
    if kind == "extra_forbidden":
        section = next((child for name, child in _sections() if name == ".".join(location[:-1])), Profile)
        return Problem(place, unknown_key(path, section.model_fields, _all_keys()).replace("a recipe has", "it has"))
    if path == "nodes":
        return Problem(place, f"nodes={given(node)} {_NODES_RULE}")
    if kind == "string_pattern_mismatch":
        return Problem(
            place, f"{path}={given(node)} has a space, a quote or one of \\ # $ ` in it, which `#SBATCH` cannot hold"
        )
    if kind == "string_too_short":
        return Problem(place, f"{path}={given(node)} is empty; write a value or delete the key")
    return Problem(place, wrong_value(path, node, cast(Any, details)))


def _sections() -> Iterator[tuple[str, type[Section]]]:
    yield from (("", Profile), ("hosts", Hosts), ("slurm", Slurm), ("network", Network), ("debug", Debug))


def _all_keys() -> list[str]:
    return [f"{prefix}.{key}".lstrip(".") for prefix, section in _sections() for key in section.model_fields]


def _find(tree: Node, location: list[str]) -> tuple[Node | None, Place]:
    here, place = tree, tree.place
    for step in location:
        found = here.value.get(step) if isinstance(here.value, dict) else None
        if found is None:
            return None, place
        here, place = found, found.place
    return here, place


# ---------------------------------------------------------------- rules


def _rule_problems(tree: Node) -> Iterator[Problem]:
    """Rules of values and between keys, each on what is well formed so far."""
    entries = cast(dict[str, Node], tree.value)
    transport = entries["transport"].value if "transport" in entries else None
    for key, owner in (("hosts", "ssh"), ("slurm", "slurm")):
        if key in entries and transport in ("local", "ssh", "slurm") and transport != owner:
            yield Problem(entries[key].place, f"{key} is for transport: {owner}, and this is {transport}; delete it")
    if debug := entries.get("debug"):
        beside = [key for key in ("modules", "container") if key in entries]
        if transport in ("ssh", "slurm"):
            yield Problem(debug.place, f"debug is for transport: local, and this is {transport}; delete it")
        elif beside:
            remedy = f"delete {beside[0]}, and set it up in the shell: a debug run has its terminal and environment"
            yield Problem(entries[beside[0]].place, f"{beside[0]} is given beside debug; {remedy}")
    if transport == "ssh" and "hosts" not in entries:
        yield Problem(tree.place, "transport: ssh needs hosts; add `hosts: {file: …}`")
    if (nodes := entries.get("nodes")) and isinstance(nodes.value, int | str) and not isinstance(nodes.value, bool):
        try:
            most = parse_nodes(nodes.value)[1]
            if transport == "local" and most > 1:
                yield Problem(nodes.place, f"nodes={given(nodes)}: transport: local is one node; use ssh or slurm")
        except UserError as error:
            yield Problem(nodes.place, str(error))
    yield from _environment_problems(entries)
    yield from _slurm_problems(entries)
    for path, node in _leaves(tree):
        if isinstance(node.value, str) and _CONTROL.search(node.value) and not path.startswith("environment."):
            yield Problem(node.place, f"{path}={given(node)} has a line break or another control character; remove it")


def _environment_problems(entries: dict[str, Node]) -> Iterator[Problem]:
    environment, passed = entries.get("environment"), entries.get("pass_environment")
    for name, node in environment.value.items() if environment and isinstance(environment.value, dict) else ():
        if not _NAME.fullmatch(name):
            yield Problem(node.place, f"environment.{name} is not a name of a variable; use letters, digits and _")
        elif is_secret_name(name):
            remedy = "set it in your shell and name it in pass_environment, which never writes the value to disk"
            yield Problem(node.place, f"environment.{name} looks like a secret; {remedy}")
        if isinstance(node.value, str) and "\x00" in node.value:
            yield Problem(node.place, f"environment.{name} has a NUL character in it; remove it")
    for node in passed.value if passed and isinstance(passed.value, list) else ():
        if isinstance(node.value, str) and not _NAME.fullmatch(node.value):
            remedy = "write names only; the values come from the submitting shell"
            yield Problem(
                node.place, f"pass_environment has {given(node)}, which is not a name of a variable; {remedy}"
            )


def _slurm_problems(entries: dict[str, Node]) -> Iterator[Problem]:
    slurm = entries.get("slurm")
    if slurm is None or not isinstance(slurm.value, dict):
        return
    time = slurm.value.get("time")
    if time is not None and (written := time.written) is not None and not _TIME.fullmatch(written):
        yield Problem(time.place, f"slurm.time={given(time)} is not a time of SLURM; write 24:00:00 or 2-00:00:00")
    extra = slurm.value.get("extra")
    for node in extra.value if extra is not None and isinstance(extra.value, list) else ():
        if not isinstance(node.value, str):
            continue
        option = node.value.partition("=")[0]
        if not option.startswith("--"):
            yield Problem(node.place, f"slurm.extra has {given(node)}; write whole long options, as in --mem=0")
        elif option in _OWN_OPTIONS:
            yield Problem(node.place, f"slurm.extra has {option}, which is set already; delete it")
        else:
            key = option.removeprefix("--").replace("-", "_")
            if key in Slurm.model_fields:
                yield Problem(node.place, f"slurm.extra has {option}, which has a key of its own; write slurm.{key}")


def _leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node.value, list):
        for child in node.value:
            yield from _leaves(child, path)
    else:
        yield path, node
