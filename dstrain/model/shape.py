"""The shape of a model without the model: what its parameters, FLOPs and activations follow from. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.errors import RecipeError
from dstrain.recipe.schema import BertConfig, Model, ModernBertConfig, RobertaConfig

_CONFIGS: dict[str, type[BertConfig] | type[ModernBertConfig]] = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "modernbert": ModernBertConfig,
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


def model_shape(model: Model) -> ModelShape:
    """Return the shape of a recipe's model: of its config, or of the folder that its weights come from.

    Raises:
        RecipeError: the folder has no readable config.json.
    """
    if model.config is not None:
        return shape_of_config(model.architecture, model.config.model_dump())
    assert model.pretrained is not None
    return shape_of_config(model.architecture, _pretrained_config(Path(model.pretrained)))


def shape_of_config(architecture: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a Transformers config describes; keys it leaves out have that architecture's defaults."""
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


def parameter_counts(shape: ModelShape, task: str, labels: int = 2) -> dict[str, int]:
    """Return the exact number of parameters by part; the decoder is tied to the token embeddings and counted there.

    Args:
        shape: the encoder.
        task: the recipe's, which decides the head.
        labels: outputs of a classifier.
    """
    hidden, norm = shape.hidden_size, _norm(shape)
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
        transform = hidden * hidden + hidden + (norm if task == "masked_lm" else 0)
    if task == "masked_lm":
        counts["prediction head"] = transform + (shape.vocab_size if shape.decoder_bias else 0)
    elif task != "retrieval":
        if task in ("token_classification", "question_answering") and shape.architecture != "modernbert":
            transform = 0  # no pooler before it
        counts["classification head"] = transform + labels * (hidden + 1)
    return counts


def layer_parameters(shape: ModelShape) -> int:
    """Return the parameters of one encoder layer: attention, MLP and two norms."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    up = 2 * inner if shape.gated_mlp else inner
    attention = 4 * hidden * hidden + (4 * hidden if shape.attention_bias else 0)
    mlp = hidden * up + inner * hidden + (up + hidden if shape.mlp_bias else 0)
    return attention + mlp + 2 * _norm(shape)


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
