"""How many outputs a recipe's head has, as far as the recipe alone tells."""

from dstrain.recipe.data import SCHEME_PREFIXES
from dstrain.recipe.schema import (
    ClassificationRecipe,
    QuestionAnsweringRecipe,
    RankingRecipe,
    Recipe,
    RetrievalRecipe,
    SentenceExtractionRecipe,
    TokenClassificationRecipe,
)

UNKNOWN_OUTPUTS = 2  # stands in where the labels are those of the training file


def head_outputs(recipe: Recipe) -> int | None:
    """Return the outputs of a fine-tuned head; None where there is no such head, and where only the data tells."""
    if isinstance(recipe, ClassificationRecipe):
        return 1 if recipe.data.target == "number" else len(recipe.data.labels) or None
    if isinstance(recipe, TokenClassificationRecipe):
        types = len(recipe.data.labels)
        return 1 + types * len(SCHEME_PREFIXES[recipe.data.scheme]) if types else None
    if isinstance(recipe, RankingRecipe | SentenceExtractionRecipe):
        return 1
    if isinstance(recipe, RetrievalRecipe):
        return 0
    return 2 if isinstance(recipe, QuestionAnsweringRecipe) else None
