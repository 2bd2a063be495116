#!/usr/bin/env python3
"""Write docs/recipes.md, the reference of all recipe keys, from the sections in dstrain/recipe:  make schema"""

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dstrain.recipe.definition import definitions
from dstrain.recipe.sweep import SearchedKey, Sweep

HEAD = """\
# Recipe keys

Generated from the sections in `dstrain/recipe` by `make schema`; do not edit. Rules between keys are checked and
explained by `dstrain recipe show RECIPE`. `base: OTHER.yaml` inherits from one other recipe; `key=value` on the command
line wins.
"""


def reference() -> str:
    """The whole page."""
    seen: set[type[BaseModel]] = set()
    tables = [table for _, definition in definitions() for table in section(definition.recipe, "", seen)]
    searched = section(SearchedKey, "sweep.parameters.KEY.", seen)
    tables += [*section(Sweep, "sweep.", seen), *searched]
    return HEAD + "".join(tables)


def section(model: type[BaseModel], prefix: str, seen: set[type[BaseModel]]) -> list[str]:
    """The table of a section's keys, then those of the sections in it that were not shown before."""
    if model in seen:
        return []
    seen.add(model)
    rows, inner = [], []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        sections = [kind for kind in kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for kind in sections:
            inner += section(kind, f"{key}.", seen)
        for kind, entry in entries(field.annotation):
            inner += section(kind, f"{key}.{entry}.", seen)
        if not sections or field.annotation not in sections:
            shown = " or ".join(describe(kind) for kind in kinds(field.annotation))
            rows.append(f"| `{key}` | {shown} | {default(field)} |\n")
    about = " ".join((model.__doc__ or "").split())
    title = f"`{prefix.rstrip('.')}`: {model.__name__}" if prefix else model.__name__
    table = "| key | value | default |\n|---|---|---|\n" + "".join(rows) if rows else ""
    return [f"\n## {title}\n{about}\n\n{table}", *inner]


def entries(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """The sections that a key holds several of, and how its entries are called: by name, or by number from 0."""
    return [
        (argument, "NAME" if get_origin(kind) is dict else "N")
        for kind in kinds(annotation)
        for argument in get_args(kind)
        if isinstance(argument, type) and issubclass(argument, BaseModel)
    ]


def kinds(annotation: Any) -> list[Any]:
    """The alternatives of a type, without Annotated's metadata."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for alternative in get_args(annotation) for kind in kinds(alternative)]
    return [annotation]


def describe(kind: Any) -> str:
    """A type in a reader's words."""
    if kind is NoneType:
        return "null"
    if get_origin(kind) is Annotated:
        return describe(get_args(kind)[0])
    if kind is Ellipsis:
        return "…"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return "[" + ", ".join(describe(part) for argument in get_args(kind) for part in kinds(argument)) + "]"
    if get_origin(kind) is dict:
        return f"{describe(get_args(kind)[1])} for each name"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def default(field: Any) -> str:
    """A key's default, as YAML would have it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/recipes.md").write_text(reference(), encoding="utf-8")
