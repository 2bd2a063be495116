"""T5 (Raffel et al. 2020). Positions are biases of attention, shared by the layers of a stack; norms have no bias."""

from collections.abc import Mapping
from typing import Any, Literal

from dstrain.architectures import (
    Linears,
    ModelKeys,
    Seq2SeqArchitecture,
    Seq2SeqShape,
    decoder_linears,
    renamed_linears,
)
from dstrain.base.section import Fraction, PositiveFloat, PositiveInt, Section

INNER = {"wi": False, "wi_0": True, "wi_1": True}  # whether it is of a gated MLP
ATTENTION: Linears = {
    **{f"layer.0.SelfAttention.{name}": ("hidden_size", "attention_size", 1) for name in "qkv"},
    "layer.0.SelfAttention.o": ("attention_size", "hidden_size", 1),
}


def _mlp(place: int) -> Linears:
    """One of the two that widen is there in a plain MLP, both others in a gated one."""
    inner = {f"layer.{place}.DenseReluDense.{name}": ("hidden_size", "intermediate_size", 1) for name in INNER}
    return {**inner, f"layer.{place}.DenseReluDense.wo": ("intermediate_size", "hidden_size", 1)}


class T5Config(Section):
    """Keys of Transformers' T5Config that shape the model. Defaults are T5-small's; null takes num_layers."""

    vocab_size: PositiveInt = 32128
    d_model: PositiveInt = 512
    d_kv: PositiveInt = 64
    d_ff: PositiveInt = 2048
    num_layers: PositiveInt = 6
    num_decoder_layers: PositiveInt | None = None
    num_heads: PositiveInt = 8
    relative_attention_num_buckets: PositiveInt = 32
    relative_attention_max_distance: PositiveInt = 128
    dropout_rate: Fraction = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-6
    initializer_factor: PositiveFloat = 1.0
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


class T5Model(ModelKeys):
    """T5 (Raffel et al. 2020)."""

    architecture: Literal["t5"]
    config: T5Config | None = None


class T5Shape(Seq2SeqShape):
    """It norms and gates in many small steps, and drops inside its MLP."""

    def has_linear(self, name: str) -> bool:
        """See `Seq2SeqShape`: which of those that widen there are."""
        return INNER.get(name.rpartition(".")[2]) in (None, self.gated_mlp)

    @property
    def top_parameters(self) -> int:
        """See `Seq2SeqShape`: the last norms of both stacks."""
        return 2 * self.hidden_size

    def stack_elements(self, inner: int) -> int:
        """See `Seq2SeqShape`: 6h for the norms."""
        return super().stack_elements(inner) + 2 * self.hidden_size

    def dropped_elements(self, inner: int) -> int:
        """See `Seq2SeqShape`."""
        return 2 * self.hidden_size + inner if self.dropout else 0

    def shared_elements(self, source: int, target: int) -> int:
        """See `Seq2SeqShape`: the biases of both self attentions."""
        return self.heads * (source**2 + target**2)


class T5(Seq2SeqArchitecture):
    """See the file."""

    section = T5Model
    config = T5Config
    linears = (
        ATTENTION | _mlp(1),
        decoder_linears(
            ATTENTION | _mlp(2), renamed_linears(ATTENTION, "layer.0.SelfAttention.", "layer.1.EncDecAttention.")
        ),
    )
    lora_targets = ("q", "v")
    dropouts = ("dropout_rate",)

    def shape(self, config: Mapping[str, Any]) -> Seq2SeqShape:
        """See `Architecture`."""
        sizes = self.complete(config)
        hidden = sizes["d_model"]
        biases = 2 * sizes["relative_attention_num_buckets"] * sizes["num_heads"]
        return T5Shape(
            architecture=self.name,
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


ARCHITECTURE = T5()
