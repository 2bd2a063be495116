"""Sequence to sequence: text written from text."""

from typing import Any

from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import SequenceToSequenceRecipe


class SequenceToSequence(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/sequence_to_sequence.py`."""

    recipe = SequenceToSequenceRecipe
    maximized = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")
    task_class = "dstrain.tasks.sequence_to_sequence:SequenceToSequence"
    predictor = "dstrain.predict.predictors:TextWriter"
    auto_model = "transformers:AutoModelForSeq2SeqLM"
    model_classes = ("ForConditionalGeneration", "MarianMTModel", "EncoderDecoderModel")
    is_default = True
    writes_text = True

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        return None  # the whole vocabulary


TASK = SequenceToSequence()
