"""ModernBERT (Warner et al. 2024)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dstrain.architectures import EncoderArchitecture, EncoderShape, ModelKeys, PackedRows, additive_mask, encode_rows
from dstrain.base.section import Fraction, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


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


class ModernBertModel(ModelKeys):
    """ModernBERT (Warner et al. 2024)."""

    architecture: Literal["modernbert"]
    config: ModernBertConfig | None = None


class ModernBertShape(EncoderShape):
    """Pre-norm layers, of which the first has the embeddings' norm for its own; one head for every task."""

    @property
    def stack_parameters(self) -> int:
        """See `EncoderShape`: the first layer has one norm fewer."""
        return super().stack_parameters - self.norm

    @property
    def outer_parameters(self) -> int:
        """See `EncoderShape`: the embeddings' norm, and one after the last layer."""
        return 2 * self.norm

    def transform_parameters(self, objective: str) -> int:
        """See `EncoderShape`."""
        return self.hidden_size * self.hidden_size + self.norm

    def frozen_parameters(self, layers: int) -> int:
        """See `EncoderShape`: the norm of the embeddings is counted as the first layer's."""
        return self.vocab_size * self.hidden_size + layers * self.layer_parameters

    @property
    def layer_elements(self) -> int:
        """8h + 4i: the layer's input; first norm's output; query, key and value; attention's output; second norm's
        input and output; the two halves of the MLP, the activation and the product.
        """
        return 8 * self.hidden_size + 4 * self.intermediate_size

    @property
    def dropped_elements(self) -> int:
        """See `EncoderShape`."""
        return (self.intermediate_size if self.dropout else 0) + (self.hidden_size if self.attention_dropout else 0)

    @property
    def unrotated_elements(self) -> int:
        """See `EncoderShape`: query and key."""
        return 2 * self.hidden_size

    def score_bytes(self, kernel: str, element: int, dropped: int) -> int:
        """See `EncoderShape`: the softmax of eager attention is in fp32, and then rounded."""
        softmax = 4 if kernel == "eager" else element
        if self.attention_dropout:
            return softmax + element + dropped
        return softmax + (element if element != softmax else 0)

    def shared_elements(self, length: int) -> int:
        """See `EncoderShape`: masks, and rotations' sines and cosines, two of each, as some layers have a window."""
        return 2 * (length + 2 * self.hidden_size // self.heads)


class ModernBert(EncoderArchitecture):
    """Rotary positions; some layers attend within a sliding window."""

    section = ModernBertModel
    config = ModernBertConfig
    linears = (
        {
            "attn.Wqkv": ("hidden_size", "hidden_size", 3),
            "attn.Wo": ("hidden_size", "hidden_size", 1),
            "mlp.Wi": ("hidden_size", "intermediate_size", 2),
            "mlp.Wo": ("intermediate_size", "hidden_size", 1),
        },
    )
    lora_targets = ("Wqkv",)
    dropouts = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
    attentions = ("sdpa", "matmul", "eager")
    head_modules = ("head", "decoder")
    rotary_bases: ClassVar[Mapping[str, str]] = {
        "global_rope_theta": "full_attention",
        "local_rope_theta": "sliding_attention",
    }

    def shape(self, config: Mapping[str, Any]) -> EncoderShape:
        """See `Architecture`."""
        sizes = self.complete(config)
        return ModernBertShape(
            architecture=self.name,
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            layers=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            learned_positions=0,
            token_types=0,
            gated_mlp=True,
            attention_bias=sizes["attention_bias"],
            mlp_bias=sizes["mlp_bias"],
            norm_bias=sizes["norm_bias"],
            decoder_bias=sizes["decoder_bias"],
            dropout=sizes["mlp_dropout"] > 0,
            attention_dropout=sizes["attention_dropout"] > 0,
        )

    def encode_packed(self, model: "PreTrainedModel", rows: PackedRows) -> "Tensor":
        """See `EncoderArchitecture`."""
        import torch

        index = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
        distance = (index[:, None] - index[None, :]).abs()  # (tokens, tokens)
        near = rows.same_document & (distance <= int(model.config.sliding_window))  # both ends included
        mask = {
            "full_attention": additive_mask(rows.same_document, model.dtype),
            "sliding_attention": additive_mask(near, model.dtype),
        }
        return encode_rows(model, rows, mask, rows.position_ids)


ARCHITECTURE = ModernBert()
