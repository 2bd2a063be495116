"""The `model` section: an architecture with its config, or a pretrained folder; what is trained of it, and how."""

from typing import Annotated, Literal

from pydantic import Field

from dstrain.base.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section


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


class RobertaConfig(BertConfig):
    """The same keys with RoBERTa-base's defaults. Positions start at 2: two of `max_position_embeddings` are unused."""

    vocab_size: PositiveInt = 50265
    max_position_embeddings: PositiveInt = 514
    type_vocab_size: PositiveInt = 1
    layer_norm_eps: PositiveFloat = 1e-5


class ModernBertConfig(Section):
    """Keys of Transformers' ModernBertConfig that shape the model. Defaults are ModernBERT-base's."""

    vocab_size: PositiveInt = 50368
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 22
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 1152
    hidden_activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    max_position_embeddings: PositiveInt = 8192
    initializer_range: PositiveFloat = 0.02
    norm_eps: PositiveFloat = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: Fraction = 0.0
    embedding_dropout: Fraction = 0.0
    mlp_bias: bool = False
    mlp_dropout: Fraction = 0.0
    decoder_bias: bool = True
    classifier_dropout: Fraction = 0.0
    global_attn_every_n_layers: PositiveInt = 3
    local_attention: PositiveInt = 128
    global_rope_theta: PositiveFloat = 160000.0
    local_rope_theta: PositiveFloat = 10000.0


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


class MarianConfig(BartConfig):
    """The same keys with MarianMT's defaults. Positions are sines, which are not trained."""

    vocab_size: PositiveInt = 58101


class Lora(Section):
    """Low-rank adapters (Hu et al. 2022), through peft: the encoder is frozen, its adapters and the head are trained.

    The output of a linear layer with an adapter gains `alpha` ÷ `rank` × what the adapter makes of its input.
    `target_modules` are names of linear layers, or ends of names, as in [query, value]; [] takes queries and values.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()


class Unfreezing(Section):
    """Gradual unfreezing (Howard & Ruder 2018): at first the head is trained, then layer after layer from the top.

    Another layer joins after each `every_steps` updates, or `every_epochs`; the embeddings are the last.
    """

    every_steps: PositiveInt | None = None
    every_epochs: PositiveFloat | None = None


class ModelKeys(Section):
    """Keys of every architecture. Exactly one of `config` (from scratch) and `pretrained` (a folder) is given.

    `frozen_layers` keeps the embeddings and as many of the first layers as they are; 0 trains everything. `dropout`
    takes the place of every dropout that the config of `pretrained` has. `attention` auto is sdpa, and matmul for
    encoders on CPUs in bf16, which have no fast fused kernel, with rows of up to 1,024 tokens.
    """

    architecture: str
    config: BertConfig | ModernBertConfig | T5Config | BartConfig | None = None
    pretrained: str | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    frozen_layers: NonNegativeInt = 0
    unfreezing: Unfreezing | None = None
    lora: Lora | None = None
    activation_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "matmul", "eager"] = "auto"


class BertModel(ModelKeys):
    """BERT (Devlin et al. 2019)."""

    architecture: Literal["bert"]
    config: BertConfig | None = None


class RobertaModel(ModelKeys):
    """RoBERTa (Liu et al. 2019)."""

    architecture: Literal["roberta"]
    config: RobertaConfig | None = None


class ModernBertModel(ModelKeys):
    """ModernBERT (Warner et al. 2024)."""

    architecture: Literal["modernbert"]
    config: ModernBertConfig | None = None


class T5Model(ModelKeys):
    """T5 (Raffel et al. 2020)."""

    architecture: Literal["t5"]
    config: T5Config | None = None


class BartModel(ModelKeys):
    """BART (Lewis et al. 2020)."""

    architecture: Literal["bart"]
    config: BartConfig | None = None


class MarianModel(ModelKeys):
    """MarianMT (Junczys-Dowmunt et al. 2018; Vaswani et al. 2017)."""

    architecture: Literal["marian"]
    config: MarianConfig | None = None


class EncoderDecoderModel(ModelKeys):
    """A BERT or RoBERTa on both sides (Rothe et al. 2020), the decoder with causal and cross attention.

    `pretrained` is such an encoder, of which both sides start (cross attention is new), or a whole such model;
    `config` is BERT's, for both. The decoder has the first `decoder_layers` of the encoder's layers; null: all.
    """

    architecture: Literal["encoder-decoder"]
    config: BertConfig | None = None
    decoder_layers: PositiveInt | None = None


Model = Annotated[BertModel | RobertaModel | ModernBertModel, Field(discriminator="architecture")]
TextToTextModel = Annotated[
    T5Model | BartModel | MarianModel | EncoderDecoderModel, Field(discriminator="architecture")
]
