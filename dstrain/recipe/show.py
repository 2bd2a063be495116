"""A recipe written out: as YAML that loads again, as a digest, as values with their origins, as differences."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dstrain.recipe.keys import flat_values
from dstrain.recipe.load import LoadedRecipe
from dstrain.recipe.schema import Recipe
from dstrain.recipe.source import parse_scalar

# What decides which rows make up a step, or what the model and its optimizer state are. All else may change on resume.
_FIXED_FOR_A_RUN = (
    "task",
    "model.architecture",
    "model.config",
    "model.pretrained",
    "model.decoder_layers",
    "model.frozen_layers",
    "model.unfreezing",
    "model.lora.rank",
    "model.lora.alpha",
    "model.lora.target_modules",
    "tokenizer",
    "data.train",
    "data.hold_out",
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
    "data.lanes",
    "data.seed",
    "data.shuffle_window",
    "data.masking",
    "data.pairs",
    "train.global_batch_rows",
    "optimizer.name",
    "checkpoint.storage",
)


def resolved_yaml(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, defaults included, which loads again to the same recipe from any directory."""
    text: str = yaml.dump(_written(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    return text


def recipe_digest(recipe: Recipe) -> str:
    """Return 32 hex digits that two recipes share exactly if all their values are equal (BLAKE2b of canonical JSON)."""
    canonical = json.dumps(recipe.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def resume_differences(old: Recipe, new: Recipe) -> list[str]:
    """Name each change that makes `new` another run than `old`: another data order, another model or optimizer state.

    Batch split, precision, ZeRO, learning rate, run length, when to save, logs and evaluation may change on resume.

    Returns:
        Lines such as `data.lanes: 64 → 32`, in the recipe's order; empty where a run of `old` can go on as `new`.
    """
    before, after = flat_values(old), flat_values(new)
    keys = [key for key in (*before, *(key for key in after if key not in before)) if _is_fixed(key)]
    return [
        f"{key}: {_shown(before.get(key))} → {_shown(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def show_text(loaded: LoadedRecipe) -> str:
    """Return the resolved recipe as lines of key, value and where the value came from."""
    rows = [(key, _shown(value), origin) for key, value, origin in _with_origins(loaded)]
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{key:{key_width}}  {value:{value_width}}  {origin}" for key, value, origin in rows)


def show_json(loaded: LoadedRecipe) -> str:
    """Return the same as JSON: a list of {"key", "value", "origin"}."""
    rows = [{"key": key, "value": value, "origin": origin} for key, value, origin in _with_origins(loaded)]
    return json.dumps(rows, indent=2, ensure_ascii=False)


def _with_origins(loaded: LoadedRecipe) -> Iterator[tuple[str, Any, str]]:
    for key, value in flat_values(loaded.recipe).items():
        place = loaded.origins.get(key)
        yield key, value, "default" if place is None else str(place)


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED_FOR_A_RUN)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _written(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values without the keys that are null and are so by default."""
    changed = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return _without_default_nulls(recipe.model_dump(mode="json", by_alias=True), changed)


def _without_default_nulls(values: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _without_default_nulls(value, changed.get(key, {}))
        elif value is not None or key in changed:
            kept[key] = value
    return kept


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever this package's reader would take it for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = isinstance(parse_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
