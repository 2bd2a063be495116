"""How a global batch is split over ranks, and how many steps a run has."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from dstrain.data.pair_slots import pair_slots
from dstrain.errors import RecipeError
from dstrain.recipe.schema import MaskedLmRecipe, Recipe


@dataclass(frozen=True)
class BatchPlan:
    """world ranks × micro_batch_rows × accumulation = rows of a global step, of `tokens` tokens."""

    world: int
    micro_batch_rows: int
    accumulation: int
    rows: int
    tokens: int

    def __str__(self) -> str:
        ranks = f"{self.world} rank{'s' if self.world != 1 else ''}"
        split = f"{ranks} × {self.micro_batch_rows} rows × {self.accumulation} accumulation"
        return f"{split} = {self.rows:,} rows = {self.tokens:,} tokens"


def legal_world_sizes(recipe: Recipe) -> list[int]:
    """Return every number of ranks that can train this recipe, in increasing order.

    Each rank must own whole lanes, and its share of the global batch must be whole micro-batches.
    """
    rows, micro = recipe.train.global_batch_rows, recipe.train.micro_batch_rows
    owned = recipe.data.lanes if isinstance(recipe, MaskedLmRecipe) else rows
    return [world for world in range(1, rows // micro + 1) if owned % world == 0 and rows % (world * micro) == 0]


def batch_plan(recipe: Recipe, world: int) -> BatchPlan:
    """Split the global batch over `world` ranks.

    Raises:
        RecipeError: no such split exists; the message names the nearest numbers of ranks that have one.
    """
    rows, micro = recipe.train.global_batch_rows, recipe.train.micro_batch_rows
    legal = legal_world_sizes(recipe)
    if world not in legal:
        below = max((size for size in legal if size < world), default=None)
        above = min((size for size in legal if size > world), default=None)
        nearest = " or ".join(str(size) for size in (below, above) if size is not None)
        rule = f"train.global_batch_rows={rows} into micro-batches of train.micro_batch_rows={micro}"
        if isinstance(recipe, MaskedLmRecipe):
            rule = f"data.lanes={recipe.data.lanes} evenly, or {rule}"
        raise RecipeError(f"{world} ranks cannot share {rule}; use {nearest} ranks")
    return BatchPlan(world, micro, rows // (world * micro), rows, rows * recipe.data.row_tokens)


def masked_per_row(recipe: MaskedLmRecipe) -> int:
    """Return the fixed number of predicted tokens in each row."""
    return max(1, round(recipe.data.masking.rate * recipe.data.sequence_length))


def pairs_per_row(recipe: MaskedLmRecipe) -> int:
    """Return the fixed number of places for pairs in each row; 0 where the recipe has no pairs."""
    return 0 if recipe.data.pairs.objective == "none" else pair_slots(recipe.data.sequence_length)


def total_steps(recipe: Recipe, corpus_tokens: int | None) -> int | None:
    """Return the number of global steps of the whole run, or None for epochs of a corpus of unknown size.

    Args:
        recipe: gives its length as steps, tokens or epochs; the last two are rounded up to whole steps.
        corpus_tokens: tokens of one epoch. For labelled examples, each of which fills one row: examples × row length.
    """
    train = recipe.train
    if train.steps is not None:
        return train.steps
    step_tokens = train.global_batch_rows * recipe.data.row_tokens
    if train.tokens is not None:
        return math.ceil(train.tokens / step_tokens)
    assert train.epochs is not None
    if corpus_tokens is None:
        return None
    return max(1, math.ceil(round(train.epochs * corpus_tokens / step_tokens, 6)))


def corpus_tokens(recipe: Recipe) -> int | None:
    """Return the number of tokens of the training corpus from its index.json, or None where that is not known."""
    location = Path(recipe.data.train)
    folder = location if location.is_dir() else location.parent
    try:
        tokens = json.loads((folder / "index.json").read_bytes())["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tokens if isinstance(tokens, int) else None
