"""A recipe written out: as YAML that loads again, as values with their origins, as differences."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dstrain.recipe.difference import Difference, shown
from dstrain.recipe.keys import flat_values
from dstrain.recipe.load import LoadedRecipe
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.source import parse_scalar

# What the model and its optimizer state are, and where a run saves. Of a path it is what lies there that counts, and
# that is compared with the checkpoint (`checkpoint/identity.py`; names and shapes of parameters).
_FIXED_FOR_A_RUN = frozenset(
    {
        "task",
        "model.architecture",
        "model.config",
        "model.decoder_layers",
        "model.frozen_layers",
        "model.unfreezing",
        "model.lora.rank",
        "model.lora.alpha",
        "model.lora.target_modules",
        "optimizer.name",
        "checkpoint.storage",
    }
)
# Which rows there are, of tasks on examples. The shards of masked_lm are compared by content, phase by phase.
_FIXED_FOR_EXAMPLES = frozenset(
    {
        "data.validation_split",
        "data.folds",
        "data.fold",
        "data.split_seed",
        "data.format",
        "data.columns",
        "data.encoding",
        "data.on_bad_example",
        "data.longest_text",
        "data.length_groups",
        "data.text_field",
        "data.pair_field",
        "data.label_field",
        "data.target",
        "data.labels",
        "data.separator",
        "data.tokens_field",
        "data.tags_field",
        "data.scheme",
        "data.joiner",
        "data.token_pattern",
        "data.question_field",
        "data.context_field",
        "data.answers_field",
        "data.unanswerable",
        "data.question_length",
        "data.source_field",
        "data.target_field",
        "data.target_length",
        "data.source_prefix",
        "data.stride",
        "data.sequence_length",
        "data.seed",
        "train.global_batch_rows",
    }
)


def resolved_yaml(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, defaults included, which loads again to the same recipe from any directory."""
    text: str = yaml.dump(_written(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    return text


def resume_differences(old: Recipe, new: Recipe) -> list[Difference]:
    """Each change that makes `new` another run than `old`, as far as the recipes alone can tell.

    Batch split, precision, ZeRO, learning rate, run length, when to save, logs and evaluation may change on resume; so
    may every path, as long as what lies there is the same.

    Returns:
        The differences in the recipe's order; empty where a run of `old` can go on as `new`.
    """
    before, after = flat_values(old), flat_values(new)
    fixed = _FIXED_FOR_A_RUN
    if not (isinstance(old, PretrainingRecipe) and isinstance(new, PretrainingRecipe)):
        fixed |= _FIXED_FOR_EXAMPLES
    keys = [*before, *(key for key in after if key not in before)]
    return [
        Difference(key, before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and not fixed.isdisjoint(_sections_of(key))
    ]


def show_text(loaded: LoadedRecipe) -> str:
    """Return the resolved recipe as lines of key, value and where the value came from."""
    rows = [(key, shown(value), origin) for key, value, origin in _with_origins(loaded)]
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{key:{key_width}}  {value:{value_width}}  {origin}" for key, value, origin in rows)


def show_json(loaded: LoadedRecipe) -> str:
    """Return the same as JSON: a list of {"key", "value", "origin"}."""
    rows = [{"key": key, "value": value, "origin": origin} for key, value, origin in _with_origins(loaded)]
    return json.dumps(rows, indent=2, ensure_ascii=False)


def _with_origins(loaded: LoadedRecipe) -> Iterator[tuple[str, Any, str]]:
    for key, value in flat_values(loaded.recipe).items():
        place = loaded.origins.get(key)
        if value is None and place is None and key.startswith("phases."):
            continue  # what a phase leaves out is as in the rest of the recipe
        yield key, value, "default" if place is None else str(place)


def _sections_of(key: str) -> Iterator[str]:
    """A key and the sections that it is in: of `model.config.hidden_size`, `model` and `model.config` too."""
    parts = key.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _written(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values without the keys that are null and are so by default."""
    changed = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return _without_default_nulls(recipe.model_dump(mode="json", by_alias=True), changed)


def _without_default_nulls(values: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _without_default_nulls(value, changed.get(key, {}))
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            kept[key] = [_without_default_nulls(*entries) for entries in zip(value, changed[key], strict=True)]
        elif value is not None or key in changed:
            kept[key] = value
    return kept


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever this package's reader would take it for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = isinstance(parse_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    has_sections = any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not has_sections)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
