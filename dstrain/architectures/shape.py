"""The shape of a model without the model: what its parameters, FLOPs and activations follow from. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.architectures.keys import (
    BertConfig,
    EncoderDecoderModel,
    Lora,
    Model,
    ModernBertConfig,
    RobertaConfig,
    TextToTextModel,
)
from dstrain.architectures.linears import STACK_LINEARS, T5_INNER, is_target, lora_targets
from dstrain.architectures.pair_shape import PAIRS, PairShape, frozen_beside_adapters, pair_parameters, pair_shape
from dstrain.errors import RecipeError

_CONFIGS: dict[str, type[BertConfig] | type[ModernBertConfig]] = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "modernbert": ModernBertConfig,
}

MATMUL_ARCHITECTURES = ("bert", "roberta", "modernbert")  # whose attention adds nothing but a mask to the scores
WITHOUT_POOLER = ("token_classification", "question_answering", "sentence_extraction")  # tasks whose heads see tokens
# The keys of a Transformers config that are a dropout's probability.
DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "modernbert": ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"),
    "t5": ("dropout_rate",),
    "bart": ("dropout", "attention_dropout", "activation_dropout"),
    "marian": ("dropout", "attention_dropout", "activation_dropout"),
    "encoder-decoder": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@dataclass(frozen=True)
class ModelShape:
    """An encoder's sizes. `*_bias` say whether the matrices and norms of that part have one."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    learned_positions: int  # 0 where positions are rotary
    token_types: int
    gated_mlp: bool
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    decoder_bias: bool
    dropout: bool  # of hidden states, in training
    attention_dropout: bool


AnyModel = Model | TextToTextModel
AnyShape = ModelShape | PairShape


def model_shape(model: AnyModel) -> AnyShape:
    """Return the shape of a recipe's model: of its config, or of the folder that its weights come from.

    Raises:
        RecipeError: the folder has no readable config.json.
    """
    if model.config is not None:
        config = model.config.model_dump()
    else:
        assert model.pretrained is not None
        config = _pretrained_config(Path(model.pretrained)) | dropout_keys(model)
    if isinstance(model, EncoderDecoderModel):
        return pair_shape(model.architecture, config, model.decoder_layers)
    return shape_of_config(model.architecture, config)


def dropout_keys(model: AnyModel) -> dict[str, float]:
    """The keys of a Transformers config that `model.dropout` sets; none where it is null."""
    return {} if model.dropout is None else dict.fromkeys(DROPOUTS[model.architecture], model.dropout)


def shape_of_config(architecture: str, config: Mapping[str, Any]) -> AnyShape:
    """Return the shape that a Transformers config describes; keys it leaves out have that architecture's defaults."""
    if architecture in PAIRS:
        return pair_shape(architecture, config)
    defaults = _CONFIGS[architecture]()
    sizes = defaults.model_dump() | {key: value for key, value in config.items() if key in type(defaults).model_fields}
    modern = architecture == "modernbert"
    return ModelShape(
        architecture=architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        learned_positions=0 if modern else sizes["max_position_embeddings"],
        token_types=0 if modern else sizes["type_vocab_size"],
        gated_mlp=modern,
        attention_bias=sizes["attention_bias"] if modern else True,
        mlp_bias=sizes["mlp_bias"] if modern else True,
        norm_bias=sizes["norm_bias"] if modern else True,
        decoder_bias=sizes["decoder_bias"] if modern else True,
        dropout=(sizes["mlp_dropout"] if modern else sizes["hidden_dropout_prob"]) > 0,
        attention_dropout=sizes["attention_dropout" if modern else "attention_probs_dropout_prob"] > 0,
    )


def parameter_counts(shape: AnyShape, objective: str, labels: int = 2) -> dict[str, int]:
    """Return the exact number of parameters by part; the decoder is tied to the token embeddings and counted there.

    Args:
        shape: the encoder, or the encoder and decoder, which have their head whatever the task.
        objective: the recipe's, which decides the head.
        labels: outputs of a classifier.
    """
    if isinstance(shape, PairShape):
        return pair_parameters(shape)
    hidden, norm, masked = shape.hidden_size, _norm(shape), objective in ("masked_lm", "paired_masked_lm")
    counts = {
        "token embeddings": shape.vocab_size * hidden,
        "position and type embeddings": (shape.learned_positions + shape.token_types) * hidden,
        "encoder layers": shape.layers * layer_parameters(shape),
        "norms outside layers": norm,
    }
    if shape.architecture == "modernbert":  # a final norm; and the embeddings' norm serves as the first layer's
        counts["encoder layers"] -= norm
        counts["norms outside layers"] += norm
        transform = hidden * hidden + norm
    else:
        transform = hidden * hidden + hidden + (norm if masked else 0)
    if masked:
        counts["prediction head"] = transform + (shape.vocab_size if shape.decoder_bias else 0)
        if objective == "paired_masked_lm":
            counts["pair head"] = hidden * hidden + hidden + 2 * (hidden + 1)  # BERT's pooler comes before it
    elif objective != "retrieval":
        if objective in WITHOUT_POOLER and shape.architecture != "modernbert":
            transform = 0
        counts["classification head"] = transform + labels * (hidden + 1)
    return counts


def parameters_of(model: AnyModel, shape: AnyShape, objective: str, labels: int = 2) -> dict[str, int]:
    """Return `parameter_counts` and, where the recipe's model has some, those of its `adapters`."""
    counts = parameter_counts(shape, objective, labels)
    return counts if model.lora is None else counts | {"adapters": lora_parameters(shape, model.lora)}


def frozen_parameters(model: AnyModel, shape: AnyShape) -> int:
    """Return the exact number of parameters that are not trained: embeddings and layers, by frozen_layers or lora."""
    if isinstance(shape, PairShape):
        return shape.fixed if model.lora is None else frozen_beside_adapters(shape)
    layers = shape.layers if model.lora is not None else model.frozen_layers
    if layers == 0:
        return 0
    embeddings = (shape.vocab_size + shape.learned_positions + shape.token_types) * shape.hidden_size
    norm = 0 if shape.architecture == "modernbert" else _norm(shape)  # it is the first layer's there
    return embeddings + norm + layers * layer_parameters(shape)


def layer_parameters(shape: ModelShape) -> int:
    """Return the parameters of one encoder layer: attention, MLP and two norms."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    up = 2 * inner if shape.gated_mlp else inner
    attention = 4 * hidden * hidden + (4 * hidden if shape.attention_bias else 0)
    mlp = hidden * up + inner * hidden + (up + hidden if shape.mlp_bias else 0)
    return attention + mlp + 2 * _norm(shape)


def lora_parameters(shape: AnyShape, lora: Lora) -> int:
    """Return the parameters of all adapters: for each linear layer, rank × (its inputs + its outputs)."""
    targets, total = lora_targets(shape.architecture, lora), 0
    stacks = (shape.layers, shape.decoder_layers) if isinstance(shape, PairShape) else (shape.layers,)
    for layers, linears in zip(stacks, STACK_LINEARS[shape.architecture], strict=True):
        for name, (inputs, outputs, times) in linears.items():
            gated = T5_INNER.get(name.rpartition(".")[2])
            if is_target(name, targets) and gated in (None, shape.gated_mlp):
                total += layers * (int(getattr(shape, inputs)) + times * int(getattr(shape, outputs)))
    return lora.rank * total


def _norm(shape: ModelShape) -> int:
    return shape.hidden_size * (2 if shape.norm_bias else 1)


def _pretrained_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Transformers folder."""
    remedy = "point to a Transformers folder (`dstrain ckpt export` makes one)"
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        raise RecipeError(f"model.pretrained={folder}: config.json: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise RecipeError(f"model.pretrained={folder}: config.json is not JSON: {error}; {remedy}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"model.pretrained={folder}: config.json is not a JSON object; {remedy}")
    return config
