"""Sequence classification: one text or a pair, towards one label, several, or a number."""

from typing import Any

from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import ClassificationRecipe


class SequenceClassification(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/sequence_classification.py`."""

    recipe = ClassificationRecipe
    maximized = ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "matthews", "auroc", "pearson", "spearman")
    minimized = ("mean_squared_error", "mean_absolute_error")
    task_class = "dstrain.tasks.sequence_classification:SequenceClassification"
    predictor = "dstrain.predict.predictors:TextClassifier"
    auto_model = "transformers:AutoModelForSequenceClassification"
    model_classes = ("ForSequenceClassification",)
    is_default = True

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        return 1 if recipe.data.target == "number" else len(recipe.data.labels) or None


TASK = SequenceClassification()
