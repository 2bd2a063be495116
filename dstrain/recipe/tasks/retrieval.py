"""Retrieval: queries and documents as unit vectors of one encoder."""

from typing import Any

from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import RetrievalRecipe


class Retrieval(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/retrieval.py`."""

    recipe = RetrievalRecipe
    maximized = ("ndcg_10", "mrr_10", "recall_10", "recall_100")
    task_class = "dstrain.tasks.retrieval:Retrieval"
    predictor = "dstrain.predict.rankers:TextEmbedder"
    auto_model = "dstrain.model.pooling:AutoEncoder"
    model_classes = ("Model",)
    is_default = True
    required_file = "1_Pooling/config.json"

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        return 0


TASK = Retrieval()
