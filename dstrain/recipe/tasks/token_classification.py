"""Token classification: a tag for each token of a text."""

from typing import Any

from dstrain.recipe.data import SCHEME_PREFIXES
from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import TokenClassificationRecipe


class TokenClassification(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/token_classification.py`."""

    recipe = TokenClassificationRecipe
    maximized = ("precision", "recall", "f1", "token_accuracy")
    task_class = "dstrain.tasks.token_classification:TokenClassification"
    predictor = "dstrain.predict.predictors:TokenTagger"
    auto_model = "transformers:AutoModelForTokenClassification"
    model_classes = ("ForTokenClassification",)
    is_default = True

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        types = len(recipe.data.labels)
        return 1 + types * len(SCHEME_PREFIXES[recipe.data.scheme]) if types else None


TASK = TokenClassification()
