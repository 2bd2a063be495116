"""Walks the schema: which keys a section has, which of them are sections themselves, and what they default to."""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dstrain.base.section import Section
from dstrain.recipe.definition import definition_of, task_names
from dstrain.recipe.schema import CommonRecipe


def section_fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the keys of a section as they are written in YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def allowed_words(field: FieldInfo) -> tuple[str, ...]:
    """Return the words a key may have, where its type is a closed list of them."""
    return tuple(word for word in get_args(field.annotation) if isinstance(word, str))


def allows_null(field: FieldInfo) -> bool:
    """Tell whether null is a value of this key (as in `clip_grad_norm: null`) and not merely a way to un-set it."""
    return type(None) in get_args(field.annotation)


def section_of(field: FieldInfo, values: Mapping[str, object]) -> type[Section] | None:
    """Return the section class a key holds, or None for a plain value; `values` chooses among several."""
    options = sections_in(field.annotation)
    if isinstance(field.discriminator, str):
        word = values.get(field.discriminator, default_tag(field))
        options = [option for option in options if word in allowed_words(option.model_fields[field.discriminator])]
    return options[0] if options else None


def entry_section(field: FieldInfo) -> type[Section] | None:
    """Return the class of each entry of a key that holds several sections, by name or in a list; None for others."""
    for option in _alternatives(field.annotation):
        if get_origin(option) in (dict, tuple):
            for argument in get_args(option):
                if sections := sections_in(argument):
                    return sections[0]
    return None


def sections_in(annotation: object) -> list[type[Section]]:
    """Return the section classes among the alternatives of a type."""
    return [option for option in _alternatives(annotation) if isinstance(option, type) and issubclass(option, Section)]


def _alternatives(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def tag_choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that choose among the sections of a key such as `model`."""
    assert isinstance(field.discriminator, str)
    options = get_args(field.annotation)
    return tuple(word for option in options for word in allowed_words(option.model_fields[field.discriminator]))


def default_tag(field: FieldInfo) -> str | None:
    """Return the word that chooses among the sections of a key where nobody wrote one, if there is such a word."""
    tags = [option.model_fields[str(field.discriminator)] for option in sections_in(field.annotation)]
    return next((tag.default for tag in tags if not tag.is_required()), None)


def recipe_class(task: object) -> type[CommonRecipe] | None:
    """Return the recipe class for a task's name; None where there is no such task."""
    return definition_of(task).recipe if isinstance(task, str) and task in task_names() else None


def leaf_defaults(section: type[Section], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield `(path, default)` for each plain value of a section that nobody wrote; required keys are left out."""
    for key, field in section_fields(section).items():
        if field.is_required():
            continue
        default = field.default
        if isinstance(default, Section):
            yield from leaf_defaults(type(default), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", default


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key that a section can have, whatever its architecture, but for entries of lists and names."""
    for key, field in section_fields(section).items():
        yield f"{prefix}{key}"
        for option in sections_in(field.annotation):
            yield from all_keys(option, f"{prefix}{key}.")


def flat_values(recipe: CommonRecipe) -> dict[str, Any]:
    """Return every value of a recipe by dotted key, in the schema's order, in JSON's types; `phases.0.steps` too."""
    return dict(_flat(recipe.model_dump(mode="json", by_alias=True)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            yield from _flat({str(number): entry for number, entry in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
