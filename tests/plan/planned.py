"""Recipes to be planned, without files."""

import json
from typing import Any

from dstrain.plan import Timeline, make_timeline
from dstrain.recipe.schema import ClassificationRecipe, MaskedLmRecipe


def masked_lm(architecture: str = "bert", config: dict[str, Any] | None = None, **sections: Any) -> MaskedLmRecipe:
    """Return a recipe of 512 rows of 128 tokens for 1,000 steps; sections update those of the same name."""
    values: dict[str, Any] = {
        "name": "example",
        "task": "masked_lm",
        "model": {"architecture": architecture, "config": config if config is not None else {}},
        "tokenizer": "tok",
        "data": {"train": "shards", "sequence_length": 128},
        "train": {"global_batch_rows": 512, "micro_batch_rows": 4, "steps": 1000},
        "optimizer": {"name": "adamw", "learning_rate": 3e-4},
    }
    for section, update in sections.items():
        values[section] = values.get(section, {}) | update if isinstance(update, dict) else update
    return MaskedLmRecipe.model_validate_json(json.dumps(values))


def phased(phases: list[dict[str, Any]], **sections: Any) -> MaskedLmRecipe:
    """Return a recipe of phases: 8 rows of 16 tokens where they say nothing else."""
    rows = {"global_batch_rows": 8, "micro_batch_rows": 4, "steps": None}
    data = {"sequence_length": 16} | sections.pop("data", {})
    return masked_lm(train=rows | sections.pop("train", {}), data=data, phases=phases, **sections)


def mixed(sources: dict[str, dict[str, Any]], phases: list[dict[str, Any]], **sections: Any) -> MaskedLmRecipe:
    """Return such a recipe with several sources; only what is not the same for all has to be said of them."""
    named = {name: {"shards": name} | source for name, source in sources.items()}
    return phased(phases, data={"train": None, "sources": named} | sections.pop("data", {}), **sections)


def timeline_of(recipe: MaskedLmRecipe | ClassificationRecipe, tokens: dict[str, int] | int | None = None) -> Timeline:
    """Lay out a run whose length is known."""
    timeline = make_timeline(recipe, tokens)
    assert timeline is not None
    return timeline


def classification(**train: Any) -> ClassificationRecipe:
    """Return a recipe of another task: 32 rows of up to 128 tokens."""
    values = masked_lm().model_dump(mode="json", by_alias=True, exclude={"phases"}) | {
        "task": "sequence_classification",
        "data": {"train": "a.csv", "valid": "b.csv", "sequence_length": 128},
        "train": {"global_batch_rows": 32, "micro_batch_rows": 4} | train,
    }
    return ClassificationRecipe.model_validate_json(json.dumps(values))
