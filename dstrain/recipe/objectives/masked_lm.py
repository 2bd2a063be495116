"""Masked-language modelling, alone or with next-sentence or sentence-order prediction beside it."""

from typing import Any

from dstrain.recipe.definition import ObjectiveDefinition, imported
from dstrain.recipe.schema import MaskedLmRecipe


class MaskedLm(ObjectiveDefinition):
    """See `data.pairs`: whether there is a second term."""

    recipe = MaskedLmRecipe
    maximized = ("accuracy", "pair_accuracy")
    minimized = ("perplexity", "pair_loss")

    def trained(self, recipe: Any) -> Any:
        """See `TaskDefinition`."""
        has_pairs = recipe.data.pairs.objective != "none"
        return imported(
            "dstrain.tasks.paired_masked_lm:PairedMaskedLm" if has_pairs else "dstrain.tasks.masked_lm:MaskedLm"
        )


OBJECTIVE = MaskedLm()
