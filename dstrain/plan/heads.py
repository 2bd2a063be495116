"""How many outputs a recipe's head has, as far as the recipe alone tells."""

from dstrain.recipe.definition import TASKS
from dstrain.recipe.schema import Recipe

UNKNOWN_OUTPUTS = 2  # stands in where the labels are those of the training file


def head_outputs(recipe: Recipe) -> int | None:
    """Return the outputs of a fine-tuned head; None where there is no such head, and where only the data tells."""
    return TASKS[recipe.task].outputs(recipe) if recipe.task in TASKS else None
