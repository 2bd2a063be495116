"""Ranking: a number for a query and a document read together."""

from typing import Any

from dstrain.recipe.definition import ExampleTaskDefinition
from dstrain.recipe.schema import RankingRecipe


class Ranking(ExampleTaskDefinition):
    """What trains it is in `dstrain/tasks/ranking.py`."""

    recipe = RankingRecipe
    maximized = ("ndcg_10", "mrr_10", "recall_10", "recall_100")
    task_class = "dstrain.tasks.ranking:Ranking"
    predictor = "dstrain.predict.rankers:PairScorer"
    auto_model = "transformers:AutoModelForSequenceClassification"
    model_classes = ("ForSequenceClassification",)

    def outputs(self, recipe: Any) -> int | None:
        """See `ExampleTaskDefinition`."""
        return 1


TASK = Ranking()
