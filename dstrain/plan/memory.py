"""Memory of one rank and disk of a checkpoint, by part.

Bytes per parameter:

    precision   weights   gradients   optimizer
    bf16        2         2           4 of fp32 weights, and the states: AdamW's two moments are 8
    fp32        4         4           the states; under ZeRO 4 more, which keeps fp32 weights of its own

ZeRO divides the optimizer by the ranks from stage 1, gradients from stage 2, weights from stage 3 (Rajbhandari
et al. 2020). Frozen parameters have weights only. In the optimizer's step a rank's gradients are there once more, in
fp32; activations are gone by then. So `total = weights + gradients + optimizer + buffers + max(activations, step)`.

Buffers are what gradients wait in until a collective takes them: without ZeRO a copy of all, up to 500 M elements,
where there is more than one rank; under ZeRO 1 and 2 the bucket and the gradients that it was filled from; under stage
3 a bucket that is made whole, however small the model, and the weights gathered at a time.

The total is what tensors take at their peak. Of CPU ranks that trained 26 M parameters in two steps it was 99 to
113 % without ZeRO, 82 to 109 % under stages 1 and 2, and 74 to 89 % under stage 3. A process takes more: libraries,
code and the allocator's gaps, on CPUs up to as much again.

Activations are what the backward pass needs. Elements per token and layer, for hidden size h and MLP size i, with an
attention that keeps no scores (SDPA):

    bert, roberta   8h + 2i    layer's input; query, key, value; attention's output; first norm's input and output;
                               second norm's input; activation function's input and output
                               (with i = 4h and dropout these are the 34 h bytes of Korthikanti et al. 2022)
    modernbert      10h + 4i   layer's input; first norm's output; query, key and value before the rotation; query and
                               key after it; attention's output; second norm's input and output; the two halves of the
                               MLP, the activation and the product

plus what dropout keeps of each element that passes it: one byte on a GPU, on a CPU a whole element. Where attention is
eager, and on a CPU where it has dropout, it keeps its scores too (and 2h fewer for modernbert). The mask that keeps
documents apart is there once for all layers. Activation checkpointing keeps each layer's input, and all of one layer at
a time.
"""

from dataclasses import dataclass, fields

from dstrain.architectures import EncoderShape, Seq2SeqShape, Shape, frozen_parameters, model_shape, parameters_of
from dstrain.optimizers import OPTIMIZERS
from dstrain.plan.attention import attention_of
from dstrain.plan.batch import masked_per_row, pairs_per_row
from dstrain.plan.engine import BUCKET_ELEMENTS, LIVE_ELEMENTS
from dstrain.plan.heads import UNKNOWN_OUTPUTS, head_outputs
from dstrain.plan.pair_memory import pair_activation_bytes
from dstrain.recipe.schema import PretrainingRecipe, Recipe, SequenceToSequenceRecipe

UNPARTITIONED_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's, not to be configured
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
WEIGHT_BYTES = 4  # of the fp32 weights that are stepped and saved


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part; `host` is what is offloaded to the host's memory."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    step: int
    host: int

    @property
    def total(self) -> int:
        """Peak on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + max(self.activations, self.step)

    def by_part(self) -> dict[str, int]:
        """Return the parts and their total by name, in bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}


def rank_memory(recipe: Recipe, parameters: int, activations: int, world: int, stage: int, frozen: int = 0) -> Memory:
    """Return the memory of one rank.

    Args:
        recipe: gives precision, and offloading for the stage that it asks for.
        parameters: of the whole model.
        activations: bytes, from `activation_bytes`.
        world: number of ranks.
        stage: ZeRO stage, not necessarily that of the recipe.
        frozen: how many of the parameters are not trained.
    """
    train = recipe.train
    element = ELEMENT_BYTES[train.precision]
    weights = element * (-(-parameters // world) if stage == 3 else parameters)
    gathered = min(parameters, LIVE_ELEMENTS)  # under stage 3
    parameters -= frozen
    owned = parameters if stage == 0 else -(-parameters // world)
    gradients = element * (owned if stage >= 2 else parameters)
    masters = 0 if train.precision == "fp32" and stage == 0 else WEIGHT_BYTES
    optimizer = (masters + OPTIMIZERS[recipe.optimizer.name].state_bytes) * owned
    step = 0 if train.precision == "fp32" and stage == 0 else 4 * owned
    if stage == 0:
        buffers = element * min(parameters, UNPARTITIONED_BUCKET_ELEMENTS) if world > 1 else 0
    elif stage < 3:
        buffers = 2 * element * min(parameters, BUCKET_ELEMENTS)
    else:
        buffers = element * (BUCKET_ELEMENTS + gathered)
    host = 0
    if stage == train.zero.stage and train.zero.offload_optimizer != "none":
        host, optimizer, step = host + optimizer + step, 0, 0
    if stage == train.zero.stage and train.zero.offload_params != "none":
        host, weights = host + weights, 0
    return Memory(weights, gradients, optimizer, buffers, activations, step, host)


def activation_bytes(recipe: Recipe, shape: Shape, *, checkpointing: bool, on_cpu: bool = False) -> int:
    """Return the bytes of activations that one micro-batch holds when its backward pass begins.

    Args:
        recipe: gives rows, row length, masking, precision and the attention's implementation; see `in_phase`.
        shape: the encoder, or of encoder and decoder.
        checkpointing: whether layers are computed again in the backward pass.
        on_cpu: whether it runs on a CPU, where torch's kernels keep more.
    """
    element = ELEMENT_BYTES[recipe.train.precision]
    if isinstance(recipe, SequenceToSequenceRecipe):
        assert isinstance(shape, Seq2SeqShape)
        return pair_activation_bytes(recipe, shape, element=element, checkpointing=checkpointing, on_cpu=on_cpu)
    assert isinstance(shape, EncoderShape)
    rows, length = _rows(recipe), recipe.data.sequence_length
    token_elements = rows * length * shape.hidden_size
    dropped = element if on_cpu else 1
    layer = rows * length * _layer_bytes_per_token(shape, element, dropped)
    layer += _attention_bytes(recipe, shape, element, dropped, on_cpu=on_cpu)
    layers = shape.layers * layer
    if checkpointing:
        layers = shape.layers * token_elements * element + layer
    embeddings = token_elements * (2 * element + (dropped if shape.dropout else 0))  # its norm's input and output
    return layers + embeddings + _shared_bytes(recipe, shape) + _head_bytes(recipe, shape, element)


def _rows(recipe: Recipe) -> int:
    """Return the rows of `data.sequence_length` in a micro-batch; where a row is many texts, more than it has."""
    return -(-recipe.train.micro_batch_rows * recipe.data.row_tokens // recipe.data.sequence_length)


def _shared_bytes(recipe: Recipe, shape: EncoderShape) -> int:
    """Return the bytes of what is made once and used by all layers, as the masks are."""
    tokens, length = _rows(recipe) * recipe.data.sequence_length, recipe.data.sequence_length
    return tokens * shape.shared_elements(length) * ELEMENT_BYTES[recipe.train.precision]


def _layer_bytes_per_token(shape: EncoderShape, element: int, dropped: int) -> int:
    statistics = 4 * shape.heads + 4 * element  # the softmax's, in fp32; mean and deviation of two norms
    return shape.layer_elements * element + shape.dropped_elements * dropped + statistics


def _attention_bytes(recipe: Recipe, shape: EncoderShape, element: int, dropped: int, *, on_cpu: bool) -> int:
    """Return what a layer's attention keeps besides its inputs and outputs: scores, and what precedes the rotation."""
    rows, length = _rows(recipe), recipe.data.sequence_length
    pairs = rows * length * length  # of tokens
    attention = attention_of(recipe, on_cpu=on_cpu)
    if attention in ("eager", "matmul"):
        return pairs * shape.heads * shape.score_bytes(attention, element, dropped)
    if on_cpu and shape.attention_dropout:  # SDPA in fp32, query, key and value included: softmax, dropout and its mask
        return pairs * shape.heads * 3 * 4 + rows * length * 3 * shape.hidden_size * (4 - element)
    return rows * length * shape.unrotated_elements * element


def _head_bytes(recipe: Recipe, shape: EncoderShape, element: int) -> int:
    """Four inputs and outputs of the transform; the logits as computed, their log-softmax and its gradient in fp32.

    Of each pair the pooler's input and output.
    """
    rows, hidden = _rows(recipe), shape.hidden_size
    if recipe.head == "sequence_classification":
        return rows * 4 * hidden * element
    if not isinstance(recipe, PretrainingRecipe):  # an output for every token
        outputs = head_outputs(recipe) or UNKNOWN_OUTPUTS
        return rows * recipe.data.sequence_length * (hidden * element + outputs * (element + 4 + 4))
    predicted = rows * masked_per_row(max(recipe.data.masking.rates), recipe.data.sequence_length)
    pairs = rows * pairs_per_row(recipe, recipe.data.sequence_length)
    return predicted * (4 * hidden * element + shape.vocab_size * (element + 4 + 4)) + pairs * 2 * hidden * element


def kept_checkpoints(recipe: Recipe, steps: int | None) -> int:
    """Return how many checkpoints a run of so many steps keeps at most; None: of unknown length, only the last ones."""
    rules = recipe.checkpoint
    kept = rules.keep_last + (rules.keep_best.count if rules.keep_best.metric is not None else 0)
    kept += 0 if recipe.early_stopping is None else 1
    if steps is None:
        return kept
    kept += steps // rules.keep_every if rules.keep_every is not None else 0
    return min(kept, -(-steps // rules.every_steps))


def checkpoint_bytes(recipe: Recipe, trained: int, frozen_bytes: int = 0) -> int:
    """Return the bytes of one checkpoint on disk; headers and the manifest come on top, a few hundred kB."""
    return trained_checkpoint_bytes(recipe) * trained + frozen_bytes


def trained_checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of a trained parameter in a checkpoint: its fp32 weight and the optimizer's states."""
    return WEIGHT_BYTES + OPTIMIZERS[recipe.optimizer.name].state_bytes


def recipe_checkpoint_bytes(recipe: Recipe, labels: int = 2) -> int:
    """Return the bytes of one checkpoint of a recipe's run: with frozen layers, without the base of adapters.

    Raises:
        RecipeError: a pretrained model's config cannot be read.
    """
    shape = model_shape(recipe.model)
    frozen = frozen_parameters(recipe.model, shape)
    trained = sum(parameters_of(recipe.model, shape, recipe.head, labels).values()) - frozen
    element = ELEMENT_BYTES[recipe.train.precision] if recipe.model.lora is None else 0
    return checkpoint_bytes(recipe, trained, frozen * element)
