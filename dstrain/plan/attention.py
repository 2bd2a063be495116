"""Which implementation of attention a run computes with."""

from dstrain.architectures import ARCHITECTURES, ModelKeys
from dstrain.recipe.schema import PretrainingRecipe, Recipe

MATMUL_TOKENS = 1024  # longest rows of which all probabilities are kept without being asked for


def attention_of(recipe: Recipe, *, on_cpu: bool) -> str:
    """The recipe's `model.attention`, `auto` resolved: `matmul` where it is faster, else the architecture's first.

    In bf16 on a CPU torch's fused kernel takes about three times as long as matrix products at 128 tokens, and twice as
    long at 512 (tools/bench/attention.py). Those keep probabilities of rows × heads × tokens² for the backward pass,
    which at some length is too much; in fp32 they are not faster. A run has one for all of its phases.
    """
    model = recipe.model
    if model.attention != "auto" or "matmul" not in ARCHITECTURES[model.architecture].attentions:
        return initial_attention(model)
    phases = recipe.phases if isinstance(recipe, PretrainingRecipe) else ()
    longest = max([recipe.data.sequence_length, *(phase.data.sequence_length or 0 for phase in phases)])
    short = longest <= MATMUL_TOKENS
    return "matmul" if on_cpu and recipe.train.precision == "bf16" and short else initial_attention(model)


def initial_attention(model: ModelKeys) -> str:
    """What a recipe's model is built with, before anybody knows its device and precision."""
    return ARCHITECTURES[model.architecture].attentions[0] if model.attention == "auto" else model.attention
