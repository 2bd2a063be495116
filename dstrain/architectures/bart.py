"""BART (Lewis et al. 2020). Learned positions, and a norm of the embeddings, in each stack."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dstrain.architectures import (
    Linears,
    ModelKeys,
    Seq2SeqArchitecture,
    Seq2SeqShape,
    decoder_linears,
    renamed_linears,
)
from dstrain.base.section import Fraction, PositiveFloat, PositiveInt, Section

LINEARS: Linears = {
    **{f"self_attn.{name}_proj": ("hidden_size", "hidden_size", 1) for name in ("q", "k", "v", "out")},
    "fc1": ("hidden_size", "intermediate_size", 1),
    "fc2": ("intermediate_size", "hidden_size", 1),
}


class BartConfig(Section):
    """Keys of Transformers' BartConfig that shape the model. Defaults are BART-large's."""

    vocab_size: PositiveInt = 50265
    max_position_embeddings: PositiveInt = 1024
    d_model: PositiveInt = 1024
    encoder_layers: PositiveInt = 12
    encoder_attention_heads: PositiveInt = 16
    encoder_ffn_dim: PositiveInt = 4096
    decoder_layers: PositiveInt = 12
    decoder_attention_heads: PositiveInt = 16
    decoder_ffn_dim: PositiveInt = 4096
    activation_function: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.0
    activation_dropout: Fraction = 0.0
    init_std: PositiveFloat = 0.02
    scale_embedding: bool = False


class BartModel(ModelKeys):
    """BART (Lewis et al. 2020)."""

    architecture: Literal["bart"]
    config: BartConfig | None = None


class Bart(Seq2SeqArchitecture):
    """See the file."""

    section: ClassVar[type[ModelKeys]] = BartModel
    config: ClassVar[type[Section]] = BartConfig
    linears = (LINEARS, decoder_linears(LINEARS, renamed_linears(LINEARS, "self_attn.", "encoder_attn.")))
    lora_targets = ("q_proj", "v_proj")
    dropouts = ("dropout", "attention_dropout", "activation_dropout")
    config_keys: ClassVar[Mapping[str, Any]] = {"forced_eos_token_id": None}  # Transformers' is another vocabulary's
    fixed_positions: ClassVar[bool] = False  # sines, which are never trained, and no norm of the embeddings

    def shape(self, config: Mapping[str, Any]) -> Seq2SeqShape:
        """See `Architecture`."""
        sizes = self.complete(config)
        hidden, positions = sizes["d_model"], sizes["max_position_embeddings"]
        each = positions * hidden if self.fixed_positions else (positions + 2) * hidden + 2 * hidden
        return Seq2SeqShape(
            architecture=self.name,
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
            fixed=2 * each if self.fixed_positions else 0,
            head=0,
            dropout=sizes["dropout"] > 0,
            attention_dropout=sizes["attention_dropout"] > 0,
        )


ARCHITECTURE = Bart()
