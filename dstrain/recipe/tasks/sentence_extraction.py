"""Sentence extraction: the sentences of a text that sum it up."""

from typing import Any

from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import SentenceExtractionRecipe


class SentenceExtraction(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/sentence_extraction.py`."""

    recipe = SentenceExtractionRecipe
    maximized = ("rouge1", "rouge2", "rougeL")
    task_class = "dstrain.tasks.sentence_extraction:SentenceExtraction"
    predictor = "dstrain.predict.predictors:SentencePicker"
    auto_model = "transformers:AutoModelForTokenClassification"
    model_classes = ("ForTokenClassification",)

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        return 1


TASK = SentenceExtraction()
