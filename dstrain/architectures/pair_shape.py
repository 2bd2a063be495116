"""The shape of an encoder with a decoder: what parameters, FLOPs and activations follow from. Imports no torch.

t5                positions are biases of attention, shared by the layers of a stack; norms have no bias
bart              learned positions and a norm of the embeddings in each stack
marian            the same with fixed sines for positions and no such norm
encoder-decoder   two BERTs or RoBERTas: the decoder has embeddings of its own and a masked-LM head
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.architectures.keys import BartConfig, BertConfig, MarianConfig, RobertaConfig, T5Config
from dstrain.base.section import Section

PAIRS = ("t5", "bart", "marian", "encoder-decoder")
_CONFIGS: dict[str, type[Section]] = {
    "t5": T5Config,
    "bart": BartConfig,
    "marian": MarianConfig,
    "bert": BertConfig,
    "roberta": RobertaConfig,
}


@dataclass(frozen=True)
class PairShape:
    """Sizes of both stacks. `attention_size` is that of all heads together; `outside` counts what is in no layer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    heads: int
    attention_size: int
    layers: int  # of the encoder
    decoder_layers: int
    intermediate_size: int
    decoder_intermediate_size: int
    gated_mlp: bool
    biased: bool  # matrices and norms
    token_embeddings: int  # how often they are there: once where both stacks and the head share them
    outside: int  # positions, token types, and norms that are in no layer
    pooler: int  # of the encoder: there, and never used
    fixed: int  # what is never trained: the pooler, sines
    head: int  # what the head has beside the token embeddings
    dropout: bool
    attention_dropout: bool

    @property
    def token_types(self) -> int:
        """Kinds of token that the model tells apart: a source is one text."""
        return 0


def pair_shape(architecture: str, config: Mapping[str, Any], decoder_layers: int | None = None) -> PairShape:
    """Return the shape that a Transformers config describes; keys it leaves out have that architecture's defaults.

    Args:
        architecture: one of `PAIRS`.
        config: of the whole model; or of the encoder that both sides of an encoder-decoder start from.
        decoder_layers: of an encoder-decoder, where they are fewer than the encoder's.
    """
    if architecture == "encoder-decoder":
        if "encoder" in config:
            return _two_berts(config["encoder"], int(config["decoder"]["num_hidden_layers"]))
        return _two_berts(config, decoder_layers)
    sizes = _complete(architecture, config)
    return _t5(sizes) if architecture == "t5" else _bart(architecture, sizes)


def _complete(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _CONFIGS[architecture]()
    return defaults.model_dump() | {key: value for key, value in config.items() if key in type(defaults).model_fields}


def _t5(sizes: Mapping[str, Any]) -> PairShape:
    hidden = sizes["d_model"]
    biases = 2 * sizes["relative_attention_num_buckets"] * sizes["num_heads"]
    return PairShape(
        architecture="t5",
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        heads=sizes["num_heads"],
        attention_size=sizes["num_heads"] * sizes["d_kv"],
        layers=sizes["num_layers"],
        decoder_layers=sizes["num_decoder_layers"] or sizes["num_layers"],
        intermediate_size=sizes["d_ff"],
        decoder_intermediate_size=sizes["d_ff"],
        gated_mlp=sizes["feed_forward_proj"] == "gated-gelu",
        biased=False,
        token_embeddings=1,
        outside=biases + 2 * hidden,
        pooler=0,
        fixed=0,
        head=0,
        dropout=sizes["dropout_rate"] > 0,
        attention_dropout=sizes["dropout_rate"] > 0,
    )


def _bart(architecture: str, sizes: Mapping[str, Any]) -> PairShape:
    hidden, positions = sizes["d_model"], sizes["max_position_embeddings"]
    each = positions * hidden if architecture == "marian" else (positions + 2) * hidden + 2 * hidden
    return PairShape(
        architecture=architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        heads=sizes["encoder_attention_heads"],
        attention_size=hidden,
        layers=sizes["encoder_layers"],
        decoder_layers=sizes["decoder_layers"],
        intermediate_size=sizes["encoder_ffn_dim"],
        decoder_intermediate_size=sizes["decoder_ffn_dim"],
        gated_mlp=False,
        biased=True,
        token_embeddings=1,
        outside=2 * each,
        pooler=0,
        fixed=2 * each if architecture == "marian" else 0,
        head=0,
        dropout=sizes["dropout"] > 0,
        attention_dropout=sizes["attention_dropout"] > 0,
    )


def _two_berts(config: Mapping[str, Any], decoder_layers: int | None) -> PairShape:
    sizes = _complete(config.get("model_type", "bert"), config)
    hidden = sizes["hidden_size"]
    return PairShape(
        architecture="encoder-decoder",
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        heads=sizes["num_attention_heads"],
        attention_size=hidden,
        layers=sizes["num_hidden_layers"],
        decoder_layers=decoder_layers or sizes["num_hidden_layers"],
        intermediate_size=sizes["intermediate_size"],
        decoder_intermediate_size=sizes["intermediate_size"],
        gated_mlp=False,
        biased=True,
        token_embeddings=2,
        outside=2 * ((sizes["max_position_embeddings"] + sizes["type_vocab_size"]) * hidden + 2 * hidden),
        pooler=hidden * (hidden + 1),
        fixed=hidden * (hidden + 1),
        head=hidden * (hidden + 1) + 2 * hidden + sizes["vocab_size"],
        dropout=sizes["hidden_dropout_prob"] > 0,
        attention_dropout=sizes["attention_probs_dropout_prob"] > 0,
    )


# ---------------------------------------------------------------- parameters


def pair_parameters(shape: PairShape) -> dict[str, int]:
    """Return the exact number of parameters by part; what is tied to the token embeddings is counted there."""
    attention = attention_parameters(shape)
    norm = shape.hidden_size * (2 if shape.biased else 1)
    encoder_layer = attention + mlp_parameters(shape, shape.intermediate_size) + 2 * norm
    decoder_layer = 2 * attention + mlp_parameters(shape, shape.decoder_intermediate_size) + 3 * norm
    counts = {
        "token embeddings": shape.token_embeddings * shape.vocab_size * shape.hidden_size,
        "positions, types and outer norms": shape.outside,
        "encoder layers": shape.layers * encoder_layer,
        "decoder layers": shape.decoder_layers * decoder_layer,
    }
    counts |= {"pooler (unused)": shape.pooler} if shape.pooler else {}
    return counts | ({"prediction head": shape.head} if shape.head else {})


def frozen_beside_adapters(shape: PairShape) -> int:
    """Return the parameters not trained beside adapters: all but the head's own and T5's last norms."""
    return sum(pair_parameters(shape).values()) - (2 * shape.hidden_size if shape.architecture == "t5" else shape.head)


def attention_parameters(shape: PairShape) -> int:
    """Return the parameters of one attention: query, key, value and output."""
    biases = 3 * shape.attention_size + shape.hidden_size if shape.biased else 0
    return 4 * shape.hidden_size * shape.attention_size + biases


def mlp_parameters(shape: PairShape, inner: int) -> int:
    """Return the parameters of one layer's MLP of `inner` features."""
    matrices = 3 if shape.gated_mlp else 2
    return matrices * shape.hidden_size * inner + (inner + shape.hidden_size if shape.biased else 0)
