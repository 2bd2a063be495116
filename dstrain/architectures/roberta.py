"""RoBERTa (Liu et al. 2019)."""

from typing import TYPE_CHECKING, Literal

from dstrain.architectures import ModelKeys, PackedRows, additive_mask, encode_rows
from dstrain.architectures.bert import Bert, BertConfig
from dstrain.base.section import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class RobertaConfig(BertConfig):
    """The same keys with RoBERTa-base's defaults. Positions start at 2: two of `max_position_embeddings` are unused."""

    vocab_size: PositiveInt = 50265
    max_position_embeddings: PositiveInt = 514
    type_vocab_size: PositiveInt = 1
    layer_norm_eps: PositiveFloat = 1e-5


class RobertaModel(ModelKeys):
    """RoBERTa (Liu et al. 2019)."""

    architecture: Literal["roberta"]
    config: RobertaConfig | None = None


class Roberta(Bert):
    """BERT without pairs, with two separators between texts, and position 0 embedded at index pad_token_id + 1."""

    section = RobertaModel
    config = RobertaConfig
    head_modules = ("lm_head",)
    pair_modules = None
    separators = 2
    unused_positions = 2

    def encode_packed(self, model: "PreTrainedModel", rows: PackedRows) -> "Tensor":
        """See `EncoderArchitecture`."""
        mask = additive_mask(rows.same_document, model.dtype)
        return encode_rows(model, rows, mask, rows.position_ids + model.config.pad_token_id + 1)


ARCHITECTURE = Roberta()
