"""Floating-point operations of a training step, from the model's shape.

Forward, per token (a multiplication and an addition are two):
    matmuls    2 × the layers' matrix parameters
    attention  4 × sequence_length × hidden_size for each layer: scores and weighted sum over the whole row (the mask
               that keeps documents apart saves nothing)
    head       2 × (hidden² + hidden × vocabulary), on the predicted tokens only; with pairs, 2 × (hidden² + 2 × hidden)
               for each slot of one, and the pooler, hidden², once more for each row: Transformers runs it by itself
An encoder with a decoder is counted by rows of the longest source and the longest target, and divided by their tokens;
keys and values of the cross attention are made once for each source token.
The backward pass costs twice the forward pass: once for the gradients of what goes in, once for those of the weights.
Frozen layers need neither, and matrices that are frozen beside adapters not the second. Activation checkpointing runs
the layers forward once more.
"""

from dataclasses import dataclass

from dstrain.architectures import EncoderShape, Seq2SeqShape, Shape, lora_parameters
from dstrain.plan.batch import masked_per_row, pairs_per_row
from dstrain.plan.heads import UNKNOWN_OUTPUTS, head_outputs
from dstrain.plan.timeline import PhasePlan, in_phase
from dstrain.recipe.schema import PretrainingRecipe, Recipe, SequenceToSequenceRecipe


@dataclass(frozen=True)
class Flops:
    """Operations per token of a row. Forward by part; of training as the mathematics needs and as they are executed."""

    matmuls: float
    attention: float
    head: float
    spared: float  # of the backward pass, by what is frozen
    activation_checkpointing: bool

    @property
    def forward(self) -> float:
        """Operations of the forward pass per token."""
        return self.matmuls + self.attention + self.head

    @property
    def model(self) -> float:
        """Forward and backward per token: what model FLOPs utilisation (MFU) counts."""
        return 3 * self.forward - self.spared

    @property
    def executed(self) -> float:
        """`model` plus what activation checkpointing computes again."""
        return self.model + (self.matmuls + self.attention if self.activation_checkpointing else 0)


def step_flops(recipe: Recipe, shape: Shape, phase: PhasePlan | None = None) -> Flops:
    """Return the operations per token of this recipe's rows; a global step has rows × `data.row_tokens` tokens.

    With a `phase`, of its rows; where its masking rate changes, of the mean one.
    """
    if phase is not None:
        recipe = in_phase(recipe, phase)
    if isinstance(recipe, SequenceToSequenceRecipe):
        assert isinstance(shape, Seq2SeqShape)
        return _pair_flops(recipe, shape)
    assert isinstance(shape, EncoderShape)
    hidden, length = shape.hidden_size, recipe.data.sequence_length
    if isinstance(recipe, PretrainingRecipe):
        predicted = sum(masked_per_row(rate, length) for rate in recipe.data.masking.rates) / 2 / length
        head = predicted * 2 * (hidden * hidden + hidden * shape.vocab_size)
        if pairs := pairs_per_row(recipe, length):
            head += 2 * ((pairs + 1) * hidden * hidden + pairs * 2 * hidden) / length
    elif recipe.head == "sequence_classification":
        head = 2 * hidden * hidden / length
    else:
        head = 2 * hidden * (head_outputs(recipe) or UNKNOWN_OUTPUTS)
    matmuls, attention = 2 * shape.layers * shape.matrix_parameters, shape.layers * shape.attention_flops(length)
    lora = recipe.model.lora
    spared = 2 * (matmuls + attention) * recipe.model.frozen_layers / shape.layers if lora is None else matmuls
    return Flops(
        matmuls=matmuls + (0 if lora is None else 2 * lora_parameters(shape, lora)),
        attention=attention,
        head=head,
        spared=spared,
        activation_checkpointing=recipe.model.activation_checkpointing,
    )


def _pair_flops(recipe: SequenceToSequenceRecipe, shape: Seq2SeqShape) -> Flops:
    source, target, tokens = recipe.data.sequence_length, recipe.data.target_length, recipe.data.row_tokens
    hidden, heads, matrices = shape.hidden_size, shape.attention_size, 3 if shape.gated_mlp else 2
    encoder = shape.layers * (4 * hidden * heads + matrices * hidden * shape.intermediate_size) * source
    decoder = (6 * hidden * heads + matrices * hidden * shape.decoder_intermediate_size) * target
    decoder += 2 * hidden * heads * source  # keys and values of the cross attention
    pairs = shape.layers * source**2 + shape.decoder_layers * target * (target + source)
    transform = hidden * hidden if shape.head else 0
    matmuls, lora = 2 * (encoder + shape.decoder_layers * decoder) / tokens, recipe.model.lora
    return Flops(
        matmuls=matmuls,
        attention=4 * heads * pairs / tokens,
        head=2 * (transform + hidden * shape.vocab_size) * target / tokens,
        spared=0.0 if lora is None else matmuls,  # what adapters take is left out of it
        activation_checkpointing=recipe.model.activation_checkpointing,
    )
