"""BERT (Devlin et al. 2019)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dstrain.architectures import EncoderArchitecture, EncoderShape, Linears, ModelKeys
from dstrain.base.section import Fraction, PositiveFloat, PositiveInt, Section

LINEARS: Linears = {
    "attention.self.query": ("hidden_size", "hidden_size", 1),
    "attention.self.key": ("hidden_size", "hidden_size", 1),
    "attention.self.value": ("hidden_size", "hidden_size", 1),
    "attention.output.dense": ("hidden_size", "hidden_size", 1),
    "intermediate.dense": ("hidden_size", "intermediate_size", 1),
    "output.dense": ("intermediate_size", "hidden_size", 1),
}


class BertConfig(Section):
    """Keys of Transformers' BertConfig that shape the model. Defaults are BERT-base's."""

    vocab_size: PositiveInt = 30522
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    hidden_dropout_prob: Fraction = 0.1
    attention_probs_dropout_prob: Fraction = 0.1
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    initializer_range: PositiveFloat = 0.02
    layer_norm_eps: PositiveFloat = 1e-12


class BertModel(ModelKeys):
    """BERT (Devlin et al. 2019)."""

    architecture: Literal["bert"]
    config: BertConfig | None = None


class Bert(EncoderArchitecture):
    """Post-norm layers, learned positions, a pooler; the only one that Transformers has a head for pairs of."""

    section: ClassVar[type[ModelKeys]] = BertModel
    config: ClassVar[type[Section]] = BertConfig
    linears = (LINEARS,)
    lora_targets = ("query", "value")
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    attentions = ("sdpa", "matmul", "eager")
    head_modules = ("cls.predictions",)
    pair_modules: ClassVar[tuple[str, str] | None] = ("bert.pooler", "cls.seq_relationship")

    def shape(self, config: Mapping[str, Any]) -> EncoderShape:
        """See `Architecture`."""
        sizes = self.complete(config)
        return EncoderShape(
            architecture=self.name,
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            layers=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            learned_positions=sizes["max_position_embeddings"],
            token_types=sizes["type_vocab_size"],
            gated_mlp=False,
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
            decoder_bias=True,
            dropout=sizes["hidden_dropout_prob"] > 0,
            attention_dropout=sizes["attention_probs_dropout_prob"] > 0,
        )


ARCHITECTURE = Bert()
