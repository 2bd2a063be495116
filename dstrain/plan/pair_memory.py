"""Activations of an encoder with a decoder, counted as those of an encoder are (`memory.py`), by attention and MLP.

    a stack's layer   4h + 4a + 2i elements per token: norms' inputs and outputs; query, key, value and attention's
                      output of a features; what is around the MLP's activation (T5: 6h, and 9i where it is gated)
    cross attention   2h + 2a per target token, 2a per source token for keys and values
    head              4h, logits, log-softmax and its gradient, per target token

Measured against what autograd keeps it is right within a quarter: kernels differ in what they keep of a dropout.
"""

from dataclasses import dataclass

from dstrain.architectures import Seq2SeqShape
from dstrain.recipe.schema import SequenceToSequenceRecipe


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element, of what dropout keeps of one; and whether attention keeps its scores."""

    element: int
    dropped: int
    scores: int  # bytes for each pair of tokens and head


def pair_activation_bytes(
    recipe: SequenceToSequenceRecipe, shape: Seq2SeqShape, *, element: int, checkpointing: bool, on_cpu: bool
) -> int:
    """Return the bytes of activations that one micro-batch holds when its backward pass begins.

    Args:
        recipe: gives rows, lengths and the attention's implementation.
        shape: of the model.
        element: bytes of an element.
        checkpointing: whether layers are computed again in the backward pass.
        on_cpu: whether it runs on a CPU, where torch's kernels keep more.
    """
    eager, dropout = recipe.model.attention == "eager", shape.attention_dropout
    kept = element * (3 if dropout else 1) if eager else 3 * 4 if on_cpu and dropout else 0
    sizes = Sizes(element, element if on_cpu else 1, kept)
    rows, source, target = recipe.train.micro_batch_rows, recipe.data.sequence_length, recipe.data.target_length
    encoder, decoder = _encoder_layer(shape, sizes, source), _decoder_layer(shape, sizes, source, target)
    layers = shape.layers * encoder + shape.decoder_layers * decoder
    if checkpointing:
        inputs = (shape.layers * source + shape.decoder_layers * target) * shape.hidden_size * element
        layers = inputs + max(encoder, decoder)
    embeddings = 2 * (source + target) * shape.hidden_size * element
    shared = shape.shared_elements(source, target) * element
    head = target * (4 * shape.hidden_size * element + shape.vocab_size * (element + 4 + 4))
    return int(rows * (layers + embeddings + shared + head))


def _encoder_layer(shape: Seq2SeqShape, sizes: Sizes, source: int) -> int:
    """Bytes of one row."""
    per_token = _stack_bytes(shape, sizes, shape.intermediate_size)
    return source * per_token + source**2 * shape.heads * sizes.scores


def _decoder_layer(shape: Seq2SeqShape, sizes: Sizes, source: int, target: int) -> int:
    """Bytes of one row."""
    hidden, heads = shape.hidden_size, shape.attention_size
    per_token = _stack_bytes(shape, sizes, shape.decoder_intermediate_size)
    per_token += (2 * hidden + 2 * heads) * sizes.element + (hidden * sizes.dropped if shape.dropout else 0)
    pairs = target * (target + source)
    return target * per_token + source * 2 * heads * sizes.element + pairs * shape.heads * sizes.scores


def _stack_bytes(shape: Seq2SeqShape, sizes: Sizes, inner: int) -> int:
    """Bytes per token of self attention and MLP."""
    return shape.stack_elements(inner) * sizes.element + shape.dropped_elements(inner) * sizes.dropped
