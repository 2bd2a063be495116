"""A launch profile says where a recipe is trained: over which transport, on which nodes, in which environment.

Strict as recipes are: unknown keys, wrong types and contradictions are reported together, each with file and line.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, StringConstraints, ValidationError, create_model

from dstrain.base.environment import is_secret_name
from dstrain.base.section import PositiveInt, Section
from dstrain.errors import UserError
from dstrain.recipe.messages import given, one_of, unknown_key, wrong_value
from dstrain.recipe.source import Node, Place, Problem, parse_yaml
from dstrain.transport.node_script import LOST_AFTER_SECONDS
from dstrain.transport.transport import TRANSPORTS, Transport

Text = Annotated[str, StringConstraints(min_length=1)]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RANGE = re.compile(r"([1-9][0-9]*)-([1-9][0-9]*)")
_NODES_RULE = "is neither a number nor a range; write 4 or 2-4"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


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
    """Every key of a profile but the transport's own section, which `profile_model` adds.

    Paths are those of the nodes; relative ones start in the folder of the command.
    """

    transport: str
    nodes: int | str = 1
    procs_per_node: PositiveInt | None = None
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

    @property
    def section(self) -> Section | None:
        """What the transport alone needs; None if it needs nothing."""
        own = type(self).model_fields.keys() - Profile.model_fields.keys()
        return cast(Section, getattr(self, own.pop())) if own else None

    def with_overrides(self, given: Sequence[str]) -> list[str]:
        """The profile's overrides and those of a command line, which win where both have a key."""
        keys = {override.partition("=")[0] for override in given}
        return [*(override for override in self.overrides if override.partition("=")[0] not in keys), *given]


@cache
def profile_model(transport: Transport) -> type[Profile]:
    """A profile with the section of a transport, which has its defaults where it is left out and need not be given."""
    if transport.section_name is None:
        return Profile
    default = ... if transport.section_example is not None else transport.section()
    fields: dict[str, Any] = {transport.section_name: (transport.section, default)}
    return create_model("Profile", __base__=Profile, **fields)


def read_profile(values: Mapping[str, Any]) -> Profile:
    """Back from `model_dump(mode="json")`.

    Raises:
        UserError: the transport is not installed here.
    """
    model = profile_model(TRANSPORTS.named(str(values["transport"]), "transport"))
    return model.model_validate_json(json.dumps(values))


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
    transport, transport_problems = _find_transport(cast(dict[str, Node], tree.value))
    problems += [*transport_problems, *_foreign_sections(cast(dict[str, Node], tree.value), transport)]
    # Of a transport that is misspelt, the section says which one is meant: its mistakes are reported as well.
    meant = transport or _owner_of_section(cast(dict[str, Node], tree.value))
    profile: Profile | None = None
    try:
        profile = (Profile if meant is None else profile_model(meant)).model_validate_json(json.dumps(tree.plain()))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            location = [str(step) for step in details["loc"] if isinstance(step, str) and step not in ("int", "str")]
            if problem := _type_problem(tree, location, cast(dict[str, Any], details), meant):
                problems.append(problem)
    problems += _rule_problems(tree, transport)
    if meant is not None and meant.section_name in cast(dict[str, Node], tree.value):
        problems += meant.section_problems(cast(dict[str, Node], tree.value)[meant.section_name])
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


def _find_transport(entries: dict[str, Node]) -> tuple[Transport | None, list[Problem]]:
    """The transport that the profile names, or what is wrong with its name."""
    node = entries.get("transport")
    if node is None or not isinstance(node.value, str):
        return None, []
    if node.value not in TRANSPORTS:
        return None, [Problem(node.place, f"transport={given(node)} {one_of(node.value, TRANSPORTS)}")]
    return TRANSPORTS.named(node.value, "transport"), []


def _section_owners() -> dict[str, list[str]]:
    """Which transports have a section of a name. Those that cannot be imported are left out."""
    owners: dict[str, list[str]] = {}
    for name in TRANSPORTS:
        with contextlib.suppress(UserError):
            if (section := TRANSPORTS[name].section_name) is not None:
                owners.setdefault(section, []).append(name)
    return owners


def _owner_of_section(entries: dict[str, Node]) -> Transport | None:
    """The transport whose section is there; None if there is none, or it is several transports'."""
    owners = [names for section, names in _section_owners().items() if section in entries]
    return TRANSPORTS[owners[0][0]] if len(owners) == 1 and len(owners[0]) == 1 else None


def _foreign_sections(entries: dict[str, Node], transport: Transport | None) -> Iterator[Problem]:
    """Sections of other transports."""
    known = {*Profile.model_fields, None if transport is None else transport.section_name}
    if transport is None or entries.keys() <= known:
        return
    for key, owners in _section_owners().items():
        if key in entries and key not in known:
            words = f"{key} is for transport: {' or '.join(owners)}, and this is {entries['transport'].value}"
            yield Problem(entries[key].place, f"{words}; delete it")


def _type_problem(
    tree: Node, location: list[str], details: dict[str, Any], transport: Transport | None
) -> Problem | None:
    """None: it is told elsewhere."""
    path, kind = ".".join(location), details["type"]
    node, place = _find(tree, location)
    if node is None:
        if path == "transport":
            return Problem(place, f"transport is missing; add one of {', '.join(TRANSPORTS)}")
        if transport is not None and path == transport.section_name:
            return None  # the rules say so
        return Problem(place, f"{path} is missing; add it")
    if kind == "extra_forbidden":
        if path in _section_owners():
            return None
        sections = dict(_sections(transport))
        section = sections.get(".".join(location[:-1]), Profile)
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


def _sections(transport: Transport | None) -> Iterator[tuple[str, type[Section]]]:
    yield from (("", Profile), ("network", Network), ("debug", Debug))
    if transport is not None and transport.section_name is not None:
        yield transport.section_name, transport.section


def _all_keys() -> list[str]:
    sections = dict(_sections(None))
    for name, owners in _section_owners().items():
        sections[name] = TRANSPORTS[owners[-1]].section
    return [f"{prefix}.{key}".lstrip(".") for prefix, section in sections.items() for key in section.model_fields]


def _find(tree: Node, location: list[str]) -> tuple[Node | None, Place]:
    here, place = tree, tree.place
    for step in location:
        found = here.value.get(step) if isinstance(here.value, dict) else None
        if found is None:
            return None, place
        here, place = found, found.place
    return here, place


# ---------------------------------------------------------------- rules


def _rule_problems(tree: Node, transport: Transport | None) -> Iterator[Problem]:
    """Rules of values and between keys, each on what is well formed so far."""
    entries = cast(dict[str, Node], tree.value)
    if transport is not None:
        yield from _transport_problems(tree, entries["transport"].value, transport)
    if "debug" in entries and (transport is None or transport.is_this_terminal):
        beside = [key for key in ("modules", "container") if key in entries]
        if beside:
            remedy = f"delete {beside[0]}, and set it up in the shell: a debug run has its terminal and environment"
            yield Problem(entries[beside[0]].place, f"{beside[0]} is given beside debug; {remedy}")
    if (nodes := entries.get("nodes")) and isinstance(nodes.value, int | str) and not isinstance(nodes.value, bool):
        try:
            parse_nodes(nodes.value)
        except UserError as error:
            yield Problem(nodes.place, str(error))
    yield from _environment_problems(entries)
    for path, node in _leaves(tree):
        if isinstance(node.value, str) and _CONTROL.search(node.value) and not path.startswith("environment."):
            yield Problem(node.place, f"{path}={given(node)} has a line break or another control character; remove it")


def _transport_problems(tree: Node, name: object, transport: Transport) -> Iterator[Problem]:
    """Rules of one transport."""
    entries = cast(dict[str, Node], tree.value)
    if (debug := entries.get("debug")) and not transport.is_this_terminal:
        yield Problem(debug.place, f"debug is for transport: local, and this is {name}; delete it")
    section, example = transport.section_name, transport.section_example
    if section is not None and section not in entries and example is not None:
        yield Problem(tree.place, f"transport: {name} needs {section}; add `{section}: {example}`")
    nodes = entries.get("nodes")
    if nodes is None or isinstance(nodes.value, bool) or not isinstance(nodes.value, int | str):
        return
    with contextlib.suppress(UserError):  # which is told anyway
        if transport.most_nodes is not None and parse_nodes(nodes.value)[1] > transport.most_nodes:
            limit = f"{given(nodes)}: transport: {name} is {_node_count(transport.most_nodes)}"
            yield Problem(nodes.place, f"nodes={limit}; use ssh or slurm")


def _node_count(most: int) -> str:
    return "one node" if most == 1 else f"at most {most} nodes"


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


def _leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node.value, list):
        for child in node.value:
            yield from _leaves(child, path)
    else:
        yield path, node
