"""JSON Schema of recipes, for editors: completion, and a red line under a wrong key while it is typed.

It is as strict as the loader about keys, types and ranges; rules between keys are the loader's alone.
"""

import json
from typing import Any

from dstrain.recipe.definition import definition_of, task_names
from dstrain.recipe.schema import CommonRecipe
from dstrain.recipe.sweep import Sweep

_BASE = {
    "type": "string",
    "title": "Base",
    "description": "One other recipe, relative to this file, whose values this one inherits.",
}
_SWEEP = {"anyOf": [{"$ref": "#/$defs/Sweep"}, {"type": "null"}], "default": None}


def recipe_schema() -> dict[str, Any]:
    """Return the schema of every kind of recipe, those of installed packages too (draft 2020-12).

    A recipe with a `base` may leave out what the base has, and may un-set any key with null.
    """
    definitions: dict[str, Any] = {}
    options = []
    recipes = [definition_of(task).recipe for task in task_names()]
    for recipe in recipes:
        schema = recipe.model_json_schema(by_alias=True)
        definitions |= schema.pop("$defs")
        definitions[recipe.__name__] = schema
        options.append({"$ref": f"#/$defs/{recipe.__name__}"})
    sweep = Sweep.model_json_schema()
    definitions |= sweep.pop("$defs") | {"Sweep": sweep}
    required = {recipe: _required(definitions[recipe.__name__], definitions) for recipe in recipes}
    for definition in definitions.values():
        _loosen(definition)
    for recipe in recipes:
        _allow_base(definitions[recipe.__name__], recipe, required[recipe])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dstrain recipe",
        "anyOf": options,
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """Return the schema as it is committed in recipe.schema.json."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _required(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that demands nothing but the required keys, in required sections too."""
    demanded: dict[str, Any] = {"required": schema.get("required", [])}
    sections = {}
    for key in demanded["required"]:
        options = [_section(option, definitions) for option in _options(schema["properties"][key])]
        if all("required" in option for option in options):
            demands = [_required(option, definitions) for option in options]
            common = [name for name in demands[0]["required"] if all(name in each["required"] for each in demands)]
            sections[key] = demands[0] | {"required": common}
    return demanded | ({"properties": sections} if sections else {})


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = schema.get("oneOf", [schema])
    return options


def _section(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = definitions.get(schema.get("$ref", "").rpartition("/")[2], {})
    return section


def _loosen(definition: dict[str, Any]) -> None:
    """Make every key optional, since a base may have it, and null allowed, since null un-sets."""
    definition.pop("required", None)
    for key, schema in definition.get("properties", {}).items():
        schema.pop("title", None)
        if "oneOf" in schema:  # architectures: without the word that tells them apart, several may fit
            schema["anyOf"] = schema.pop("oneOf")
            schema.pop("discriminator")
        for option in (schema, *schema.get("anyOf", [])):
            if "patternProperties" in option:  # sections by name, each of which null un-sets as well
                named = option["patternProperties"].items()
                option["patternProperties"] = {name: {"anyOf": [entry, {"type": "null"}]} for name, entry in named}
                option["additionalProperties"] = False
        options = schema.get("anyOf", [])
        if {"type": "null"} not in options:
            described = {name: schema.pop(name) for name in ("default", "description") if name in schema}
            definition["properties"][key] = {"anyOf": [schema, {"type": "null"}]} | described


def _allow_base(definition: dict[str, Any], recipe: type[CommonRecipe], required: dict[str, Any]) -> None:
    definition["properties"] = {"base": _BASE} | definition["properties"] | {"sweep": _SWEEP}
    definition["anyOf"] = [{"required": ["base"]}, required]
    definition["title"] = recipe.__name__
