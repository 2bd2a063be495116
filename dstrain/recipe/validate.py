"""From a tree of values with places to a typed recipe, or to every mistake in it: types, then rules, then files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dstrain.architectures import ARCHITECTURES, checked_architecture
from dstrain.base.section import Section
from dstrain.optimizers import OPTIMIZERS, checked_optimizer
from dstrain.recipe.definition import task_names
from dstrain.recipe.files import absolute, file_problems, is_path
from dstrain.recipe.keys import (
    all_keys,
    allows_null,
    default_tag,
    entry_section,
    leaf_defaults,
    recipe_class,
    section_fields,
    section_of,
    sections_in,
    tag_choices,
)
from dstrain.recipe.messages import given, nearest, one_of, unknown_key, wrong_value
from dstrain.recipe.phase_rules import broken_phase_rules, run_steps
from dstrain.recipe.rules import broken_rules
from dstrain.recipe.schema import CommonRecipe, Recipe
from dstrain.recipe.source import Node, Place, Problem


def validated(tree: Node, *, check_files: bool) -> tuple[Recipe | None, Node, list[Problem]]:
    """Return the recipe (None if anything is wrong), the tree without un-set keys, and everything that is wrong.

    Args:
        tree: the merged mapping of all sources, without `base`.
        check_files: whether paths in the recipe must lead somewhere.
    """
    tree, recipe_type, unjudged, problems = _with_known_sections(tree)
    tree = _without_unset(tree, recipe_type)
    recipe: CommonRecipe | None = None
    broken = list(unjudged)
    try:
        recipe = recipe_type.model_validate_json(_json(tree, recipe_type), by_alias=True, by_name=False)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            finding = _locate(tree, recipe_type, details["loc"])
            if finding is None:
                continue
            if not any(_is_within(finding.path, section) for section in unjudged):
                problems.append(_type_problem(tree, finding, details))
            broken.append(finding.path)
    known = {key: value for key, value in _known(recipe_type, tree) if not any(_is_within(key, b) for b in broken)}
    if "phases" not in section_fields(recipe_type):
        known["phases"] = ()
    known["run.steps"] = run_steps(known)
    found = [*broken_rules(known), *(file_problems(known) if check_files else ())]
    problems += [_rule_problem(tree, keys, known[keys[0]], sentence) for keys, sentence in found]
    problems += [_rule_problem(tree, keys, value, sentence) for keys, value, sentence in broken_phase_rules(known)]
    return (None if problems else cast(Recipe, recipe)), tree, problems


# ---------------------------------------------------------------- which classes judge the tree


def _with_known_sections(tree: Node) -> tuple[Node, type[CommonRecipe], list[str], list[Problem]]:
    """Choose the classes by `task`, `model.architecture` and `optimizer.name`.

    Where one is wrong, that is a problem, and the nearest choice stands in for it so that the rest can be judged. Where
    it says nothing, the first choice stands in, and the keys which depend on it are returned as not to be judged.
    """
    root = dict(_entries(tree))
    unjudged: list[str] = []
    problems: list[Problem] = []
    task = root.get("task")
    recipe_type = recipe_class(task.value) if task is not None else None
    if recipe_type is None:
        tasks = task_names()
        problems.append(_choice_problem(tree, "task", task, tasks))
        close = _close(task, tasks)
        recipe_type = recipe_class(close or tasks[0])
        assert recipe_type is not None
        root["task"] = Node(close or tasks[0], tree.place)
        unjudged += [] if close else ["task", "data"]
    for key, names, checked, unjudged_keys in (
        ("model", ARCHITECTURES, checked_architecture, ["model.architecture", "model.config"]),
        ("optimizer", OPTIMIZERS, checked_optimizer, ["optimizer"]),
    ):
        section, field = root.get(key), recipe_type.model_fields[key]
        if section is None or not isinstance(section.value, dict):
            continue
        tag, choices = str(field.discriminator), tag_choices(field)
        word = section.value.get(tag)
        if word is not None and word.value in names:
            checked(str(word.value))  # one that is broken is none of the choices
        if (default_tag(field) if word is None or word.value is None else word.value) not in choices:
            problems.append(_choice_problem(section, f"{key}.{tag}", word, choices))
            close = _close(word, choices)
            stand_in = Node(close or choices[0], section.place)
            root[key] = Node({**section.value, tag: stand_in}, section.place)
            unjudged += [] if close else unjudged_keys
    return Node(root, tree.place), recipe_type, unjudged, problems


def _close(node: Node | None, choices: Sequence[str]) -> str | None:
    return nearest(node.value, choices) if node is not None and isinstance(node.value, str) else None


def _choice_problem(section: Node, path: str, node: Node | None, choices: Sequence[str]) -> Problem:
    if node is None or node.value is None:
        return Problem(section.place, f"{path} is missing; add one of {', '.join(choices)}")
    return Problem(node.place, f"{path}={given(node)} {one_of(node.value, choices)}")


def _without_unset(tree: Node, section: type[Section]) -> Node:
    """Drop keys that are null where null is no value of theirs: they fall back to their defaults."""
    fields = section_fields(section)
    kept: dict[str, Node] = {}
    for key, node in _entries(tree).items():
        if key not in fields:
            kept[key] = node
        elif node.value is not None or allows_null(fields[key]):
            child, entry_class = _child(fields[key], node), entry_section(fields[key])
            if child is not None:
                node = _without_unset(node, child)
            elif entry_class is not None:
                node = _without_unset_entries(node, entry_class)
            kept[key] = node
    return Node(kept, tree.place)


def _without_unset_entries(holder: Node, entry_class: type[Section]) -> Node:
    """Do so in each section of a list, or of several with names; a name that is null is dropped itself."""

    def mended(node: Node) -> Node:
        return _without_unset(node, entry_class) if isinstance(node.value, dict) else node

    if isinstance(holder.value, dict):
        named = {name: mended(node) for name, node in holder.value.items() if node.value is not None}
        return Node(named, holder.place)
    if isinstance(holder.value, list):
        return Node([mended(node) for node in holder.value], holder.place)
    return holder


def _child(field: FieldInfo, node: Node) -> type[Section] | None:
    """Return the class of the section written under a key, or None where no section is written there."""
    if not isinstance(node.value, dict):
        return None
    return section_of(field, {key: entry.value for key, entry in node.value.items()})


def _json(tree: Node, recipe_type: type[CommonRecipe]) -> str:
    """Return the tree as JSON with absolute paths; only from JSON does pydantic's strict mode take lists for tuples."""
    values = _with_absolute_paths(tree.plain(), "")
    for key, field in section_fields(recipe_type).items():
        # Pydantic chooses among sections by what is written, not by a default.
        if isinstance(field.discriminator, str) and isinstance(section := values.get(key), dict):
            section.setdefault(field.discriminator, default_tag(field))
    return json.dumps(values)


def _with_absolute_paths(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _with_absolute_paths(entry, f"{key}.{name}" if key else name) for name, entry in value.items()}
    return absolute(value) if isinstance(value, str) and is_path(key) else value


# ---------------------------------------------------------------- from findings to problems


@dataclass(frozen=True)
class _Finding:
    """What pydantic found something about.

    `section` is the class that has the key, `outer` the one of which all keys are known: the recipe's, or that of an
    entry of a list, whose own key is `outer_prefix`.
    """

    path: str
    node: Node | None
    section: type[Section] | None
    outer: type[Section]
    outer_prefix: str


def _locate(tree: Node, recipe_type: type[CommonRecipe], location: tuple[int | str, ...]) -> _Finding | None:
    """Find the key of a finding; None where it is about an alternative of a type that was not meant.

    In pydantic's location the tag of an alternative follows a key that has several.
    """
    path: list[str] = []
    here: Node | None = tree
    outer: type[Section] = recipe_type
    prefix = ""
    owner: type[Section] | None = None
    child: type[Section] | None = recipe_type
    entry_class: type[Section] | None = None
    tagged = False
    for step in location:
        if tagged:  # the tag itself, as in model → bert → config, or as in rate → MaskingRamp → from
            tagged = False
            if owner is not None and _is_other_alternative(step, section_fields(owner)[path[-1]], child):
                return None
            continue
        if entry_class is not None and step != "[key]":
            path.append(str(step))
            prefix, outer, child, entry_class = ".".join(path) + ".", entry_class, entry_class, None
            here = _entry(here, str(step))
            continue
        if isinstance(step, int) or step == "[key]" or (path and not _has_entries(here)):
            break  # an entry of a list of plain values is reported as the list
        owner = child
        field = section_fields(child).get(step) if child else None
        path.append(step)
        here = _entry(here, step)
        child = _child(field, here) if field is not None and here is not None else None
        entry_class = entry_section(field) if field is not None and _has_entries(here) else None
        tagged = field is not None and (
            (field.discriminator is not None and child is not None) or _has_plain_alternatives(field)
        )
    return _Finding(".".join(path), here, owner, outer, prefix)


def _has_plain_alternatives(field: FieldInfo) -> bool:
    """Tell whether a key may hold a section or a plain value, as in `rate: 0.3` and `rate: {from: 0.3, to: 0.15}`."""
    others = [option for option in get_args(field.annotation) if option is not type(None)]
    return len(others) > 1 and len(sections_in(field.annotation)) == 1


def _is_other_alternative(tag: int | str, field: FieldInfo, child: type[Section] | None) -> bool:
    if not _has_plain_alternatives(field):
        return False
    names = [section.__name__ for section in sections_in(field.annotation)]
    return tag != child.__name__ if child is not None else tag in names


def _has_entries(node: Node | None) -> bool:
    return node is not None and isinstance(node.value, dict | list)


def _entry(node: Node | None, key: str) -> Node | None:
    """Return what is written under a key of a section, or under a number of a list."""
    if node is None:
        return None
    if isinstance(node.value, list):
        return node.value[int(key)] if key.isdecimal() and int(key) < len(node.value) else None
    return node.value.get(key) if isinstance(node.value, dict) else None


def _type_problem(tree: Node, finding: _Finding, details: ErrorDetails) -> Problem:
    path, node = finding.path, finding.node
    if node is None:
        return Problem(_nearest_place(tree, path), f"{path} is missing; add it")
    if details["type"] == "extra_forbidden" and finding.section is not None:
        names = section_fields(finding.section)
        return Problem(node.place, unknown_key(path, names, all_keys(finding.outer, finding.outer_prefix)))
    if details["loc"][-1] == "[key]":
        rule = "must be named by letters, digits, - and _ (a point would begin a key); choose another name"
        return Problem(node.place, f"{path} {rule}")
    return Problem(node.place, wrong_value(path, node, details))


def _rule_problem(tree: Node, keys: tuple[str, ...], value: object, sentence: str) -> Problem:
    """Blame the first key; where it is a default, the place is that of the first key which somebody wrote."""
    nodes = [_node_at(tree, key) for key in keys]
    place = next((node.place for node in nodes if node is not None), _nearest_place(tree, keys[0]))
    blamed = nodes[0]
    if blamed is not None and blamed.value is not None and not isinstance(blamed.value, dict):
        return Problem(place, f"{keys[0]}={given(blamed)} {sentence}")
    shown = "" if value is None or isinstance(value, dict) else f"={value} (the default)"
    return Problem(place, f"{keys[0]}{shown} {sentence}")


def _known(section: type[Section], tree: Node, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every key with its value, defaults included, sections as mappings, missing required keys left out."""
    for key, field in section_fields(section).items():
        path = f"{prefix}{key}"
        node = _entries(tree).get(key)
        if node is None:
            if not field.is_required():
                yield path, field.default
                if isinstance(field.default, Section):
                    yield from leaf_defaults(type(field.default), f"{path}.")
            continue
        yield path, node.plain()
        child, entry_class = _child(field, node), entry_section(field)
        if child is not None:
            yield from _known(child, node, f"{path}.")
        if entry_class is not None and isinstance(node.value, dict | list):
            named = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
            for name, entry in named:
                if isinstance(entry.value, dict):
                    yield f"{path}.{name}", entry.plain()
                    yield from _known(entry_class, entry, f"{path}.{name}.")


def _node_at(tree: Node, path: str) -> Node | None:
    here: Node | None = tree
    for key in path.split("."):
        here = _entry(here, key)
    return here


def _nearest_place(tree: Node, path: str) -> Place:
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        node = _node_at(tree, ".".join(parts[:length]))
        if node is not None:
            return node.place
    return tree.place


def _is_within(path: str, section: str) -> bool:
    return path == section or path.startswith(section + ".")


def _entries(node: Node) -> dict[str, Node]:
    assert isinstance(node.value, dict)
    return node.value
