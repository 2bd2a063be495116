"""From a YAML file and overrides to a validated recipe. All mistakes are collected and reported together.

    file ─┐
    base ─┼─ merged tree of values with places ─ types (pydantic) ─ rules between keys ─ files ─► recipe
    a.b=c ┘

A recipe may name one other as `base:` (relative to its own folder; a base has no base). Sections merge key by key,
lists and values replace, and null un-sets a key. A `sweep:` section is judged here too, and is no part of the recipe.
Paths to data, tokenizer and models are taken from the current directory, as the shell would, and are made absolute at
once, so that the copy in the run folder keeps its meaning. Variables in them are not expanded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.errors import RecipeError
from dstrain.recipe.messages import given
from dstrain.recipe.schema import Recipe
from dstrain.recipe.source import COMMAND_LINE, Node, Place, Problem, parse_yaml, read_yaml
from dstrain.recipe.sweep import Sweep, read_sweep, unmeasured
from dstrain.recipe.validate import validated


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and for each dotted key that somebody wrote the place where it was written."""

    recipe: Recipe
    origins: Mapping[str, Place]
    path: str
    sweep: Sweep | None = None


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> LoadedRecipe:
    """Read, inherit, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `train.zero.stage=2` and the like, by the same rules as YAML.
        check_files: whether paths in the recipe must lead somewhere.

    Raises:
        RecipeError: its text has one line per mistake, each with file:line, what was given, the rule and the remedy.
    """
    tree, problems = _read_with_base(str(path))
    problems += _apply_overrides(tree, overrides)
    searched = _entries(tree).pop("sweep", None)
    sweep, found = read_sweep(searched) if searched is not None and searched.value is not None else (None, [])
    problems += found
    recipe, tree, found = validated(tree, check_files=check_files)
    problems += found
    if recipe is not None and sweep is not None and searched is not None:
        problems += unmeasured(searched, sweep, recipe.task)
    if problems:
        ordered = sorted(
            set(problems), key=lambda p: (p.place.file != str(path), p.place.file, p.place.line or 0, p.text)
        )
        raise RecipeError("\n".join(str(problem) for problem in ordered))
    assert recipe is not None
    return LoadedRecipe(recipe, dict(_origins(tree)), str(path), sweep)


def _origins(tree: Node, prefix: str = "") -> Iterator[tuple[str, Place]]:
    for key, node in _entries(tree).items():
        if isinstance(node.value, dict):
            yield from _origins(node, f"{prefix}{key}.")
        elif isinstance(node.value, list) and any(isinstance(entry.value, dict) for entry in node.value):
            numbered = {str(number): entry for number, entry in enumerate(node.value)}
            yield from _origins(Node(numbered, node.place), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node.place


# ---------------------------------------------------------------- one tree from several sources


def _read_with_base(path: str) -> tuple[Node, list[Problem]]:
    tree, problems = read_yaml(path)
    base = _entries(tree).pop("base", None)
    if base is None:
        return tree, problems
    if not isinstance(base.value, str):
        problems.append(
            Problem(base.place, f"base={given(base)} must be the path of one recipe; write base: other.yaml")
        )
        return tree, problems
    base_path = Path(path).parent / Path(base.value).expanduser()
    if base_path.resolve() == Path(path).resolve():
        problems.append(Problem(base.place, f"base={given(base)} is this file itself; name another recipe"))
        return tree, problems
    if not base_path.is_file():
        problems.append(Problem(base.place, f"base={given(base)} does not exist (looked for {base_path}); correct it"))
        return tree, problems
    base_tree, base_problems = read_yaml(str(base_path))
    second = _entries(base_tree).pop("base", None)
    if second is not None:
        text = (
            f"base={given(second)}: a recipe that is inherited from ({path} does) cannot inherit itself; write it out"
        )
        base_problems.append(Problem(second.place, text))
    return _merged(base_tree, tree), base_problems + problems


def _apply_overrides(tree: Node, overrides: Sequence[str]) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            problems.append(
                Problem(COMMAND_LINE, f"{override!r} is not an override; write key=value, as in train.steps=100")
            )
        elif key in seen:
            problems.append(Problem(COMMAND_LINE, f"{override}: {key} is given twice; keep one of them"))
        elif not text:
            problems.append(Problem(COMMAND_LINE, f"{override}: the value is empty; write {key}=null to un-set it"))
        elif key == "base":
            problems.append(Problem(COMMAND_LINE, f"{override}: base belongs in the file; write it there"))
        else:
            seen.add(key)
            try:
                node, found = parse_yaml(text, COMMAND_LINE)
            except RecipeError as error:
                problems.append(Problem(COMMAND_LINE, f"{override}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}"))
                continue
            problems += found
            if (sentence := _no_such_entry(tree, parts)) is not None:
                problems.append(Problem(COMMAND_LINE, f"{override}: {sentence}"))
                continue
            for part in reversed(parts):
                node = Node({part: node}, COMMAND_LINE)
            _entries(tree).update(_entries(_merged(tree, node)))
    return problems


def _no_such_entry(tree: Node, parts: Sequence[str]) -> str | None:
    """Say that a key as `phases.7.steps` is of an entry that a list has not; None where it is of one that it has."""
    here = tree
    for depth, part in enumerate(parts):
        if isinstance(here.value, list):
            count = len(here.value)
            if part.isdecimal() and int(part) < count:
                here = here.value[int(part)]
                continue
            known = f"its entries are numbered from 0 to {count - 1}" if count else "it has no entries"
            return f"{'.'.join(parts[:depth])} is a list, and {known}; use one of them, or give the whole list"
        if not isinstance(here.value, dict) or part not in here.value:
            return None
        here = here.value[part]
    return None


def _merged(base: Node, over: Node) -> Node:
    """Return `over` on top of `base`: sections key by key, anything else replaced.

    `phases.0.steps=9` on the command line changes an entry of a list, which otherwise is replaced as a whole.
    """
    if isinstance(base.value, list) and isinstance(over.value, dict) and over.place == COMMAND_LINE:
        numbered = {str(number): entry for number, entry in enumerate(base.value)}
        if over.value.keys() <= numbered.keys():
            merged = [_merged(entry, over.value[n]) if n in over.value else entry for n, entry in numbered.items()]
            return Node(merged, base.place)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    entries = dict(base.value)
    for key, node in over.value.items():
        entries[key] = _merged(entries[key], node) if key in entries else node
    return Node(entries, base.place if over.place == COMMAND_LINE else over.place)


def _entries(node: Node) -> dict[str, Node]:
    assert isinstance(node.value, dict)
    return node.value
