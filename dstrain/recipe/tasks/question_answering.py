"""Question answering: the span of a text that answers a question."""

from typing import Any

from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import QuestionAnsweringRecipe


class QuestionAnswering(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/question_answering.py`."""

    recipe = QuestionAnsweringRecipe
    maximized = ("exact_match", "f1", "answerable_f1", "unanswerable_f1")
    task_class = "dstrain.tasks.question_answering:QuestionAnswering"
    predictor = "dstrain.predict.predictors:AnswerFinder"
    auto_model = "transformers:AutoModelForQuestionAnswering"
    model_classes = ("ForQuestionAnswering",)
    is_default = True

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        return 2


TASK = QuestionAnswering()
