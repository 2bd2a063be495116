"""From a tree of values with places to a typed recipe, or to every mistake in it: types, then rules, then files."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dstrain.recipe.fields import Section
from dstrain.recipe.files import PATH_KEYS, absolute, file_problems
from dstrain.recipe.keys import (
    RECIPES,
    all_keys,
    allowed_words,
    allows_null,
    leaf_defaults,
    recipe_class,
    section_fields,
    section_of,
    tag_choices,
)
from dstrain.recipe.messages import given, nearest, one_of, unknown_key, wrong_value
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
        recipe = recipe_type.model_validate_json(_json(tree), by_alias=True, by_name=False)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            path, node = _locate(tree, recipe_type, details["loc"])
            if not any(_is_within(path, section) for section in unjudged):
                problems.append(_type_problem(tree, recipe_type, path, node, details))
            broken.append(path)
    known = {key: value for key, value in _known(recipe_type, tree) if not any(_is_within(key, b) for b in broken)}
    found = [*broken_rules(known), *(file_problems(known) if check_files else ())]
    problems += [_rule_problem(tree, keys, known[keys[0]], sentence) for keys, sentence in found]
    return (None if problems else cast(Recipe, recipe)), tree, problems


# ---------------------------------------------------------------- which classes judge the tree


def _with_known_sections(tree: Node) -> tuple[Node, type[CommonRecipe], list[str], list[Problem]]:
    """Choose the classes by `task` and `model.architecture`.

    Where one is wrong, that is a problem, and the nearest choice stands in for it so that the rest can be judged. Where
    it says nothing, the first choice stands in, and the keys which depend on it are returned as not to be judged.
    """
    root = dict(_entries(tree))
    unjudged: list[str] = []
    problems: list[Problem] = []
    task = root.get("task")
    recipe_type = recipe_class(task.value) if task is not None else None
    if recipe_type is None:
        tasks = [word for recipe in RECIPES for word in allowed_words(recipe.model_fields["task"])]
        problems.append(_choice_problem(tree, "task", task, tasks))
        close = _close(task, tasks)
        recipe_type = recipe_class(close or tasks[0])
        assert recipe_type is not None
        root["task"] = Node(close or tasks[0], tree.place)
        unjudged += [] if close else ["task", "data"]
    model = root.get("model")
    if model is not None and isinstance(model.value, dict):
        architecture = model.value.get("architecture")
        architectures = tag_choices(recipe_type.model_fields["model"])
        if architecture is None or architecture.value not in architectures:
            problems.append(_choice_problem(model, "model.architecture", architecture, architectures))
            close = _close(architecture, architectures)
            stand_in = Node(close or architectures[0], model.place)
            root["model"] = Node({**model.value, "architecture": stand_in}, model.place)
            unjudged += [] if close else ["model.architecture", "model.config"]
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
            child = _child(fields[key], node)
            kept[key] = _without_unset(node, child) if child else node
    return Node(kept, tree.place)


def _child(field: FieldInfo, node: Node) -> type[Section] | None:
    """Return the class of the section written under a key, or None where no section is written there."""
    if not isinstance(node.value, dict):
        return None
    return section_of(field, {key: entry.value for key, entry in node.value.items()})


def _json(tree: Node) -> str:
    """Return the tree as JSON with absolute paths; only from JSON does pydantic's strict mode take lists for tuples."""
    data = cast(dict[str, Any], tree.plain())
    for path in PATH_KEYS:
        *sections, key = path.split(".")
        holder: Any = data
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = absolute(holder[key])
    return json.dumps(data)


# ---------------------------------------------------------------- from findings to problems


def _locate(tree: Node, section: type[Section], location: tuple[int | str, ...]) -> tuple[str, Node | None]:
    """Return the dotted key of a finding and what is written there; pydantic adds the tags of unions."""
    path: list[str] = []
    here: Node | None = tree
    child: type[Section] | None = section
    tagged = False
    for step in location:
        if tagged:  # the tag itself, as in model → bert → config
            tagged = False
            continue
        if isinstance(step, int):  # an entry of a list is reported as the list
            break
        field = section_fields(child).get(step) if child else None
        path.append(step)
        here = here.value.get(step) if here is not None and isinstance(here.value, dict) else None
        child = _child(field, here) if field is not None and here is not None else None
        tagged = field is not None and field.discriminator is not None and child is not None
    return ".".join(path), here


def _type_problem(
    tree: Node, recipe_type: type[CommonRecipe], path: str, node: Node | None, details: ErrorDetails
) -> Problem:
    if node is None:
        return Problem(_nearest_place(tree, path), f"{path} is missing; add it")
    if details["type"] == "extra_forbidden":
        section, _, _ = path.rpartition(".")
        siblings = [key for key in all_keys(recipe_type) if key.rpartition(".")[0] == section]
        names = dict.fromkeys(key.rpartition(".")[2] for key in siblings)
        return Problem(node.place, unknown_key(path, names, all_keys(recipe_type)))
    return Problem(node.place, wrong_value(path, node, details))


def _rule_problem(tree: Node, keys: tuple[str, ...], value: object, sentence: str) -> Problem:
    """Blame the first key; where it is a default, the place is that of the first key which somebody wrote."""
    nodes = [_node_at(tree, key) for key in keys]
    place = next((node.place for node in nodes if node is not None), _nearest_place(tree, keys[0]))
    blamed = nodes[0]
    if blamed is not None and not isinstance(blamed.value, dict):
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
        child = _child(field, node)
        if child is not None:
            yield from _known(child, node, f"{path}.")


def _node_at(tree: Node, path: str) -> Node | None:
    here: Node | None = tree
    for key in path.split("."):
        here = here.value.get(key) if here is not None and isinstance(here.value, dict) else None
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
