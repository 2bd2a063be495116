"""What dstrain has to know of a model architecture: one file each says it, of this package or of another one.

    section, config keys      what a recipe's `model` may hold
    shape                     parameters, FLOPs and activations, from a config and without a model
    names                     of the linear layers, dropouts, embeddings and head that the Transformers model has
    encode_packed             how rows of several documents are given to it

Imports no torch: a recipe is checked and planned where there is none. Methods that take a model import it themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from dstrain.architectures._encoder_shape import EncoderShape
from dstrain.architectures._linears import Linears
from dstrain.architectures._packed_rows import PackedRows, additive_mask, encode_rows
from dstrain.architectures._sections import ModelKeys
from dstrain.architectures._seq2seq_shape import Seq2SeqShape
from dstrain.base.section import Section

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Shape = EncoderShape | Seq2SeqShape


class Architecture(ABC):
    """An architecture of Transformers, as a recipe's `model.architecture` names it. See the two kinds below."""

    section: ClassVar[type[ModelKeys]]  # of a recipe; its `architecture` is Literal[NAME], its `config` a Section
    config: ClassVar[type[Section]]  # the keys of Transformers' config that shape the model, with their defaults
    linears: ClassVar[tuple[Linears, ...]]  # of each stack's layers: the encoder's and, if there is one, the decoder's
    lora_targets: ClassVar[tuple[str, ...]]  # ends of the names of linear layers that have adapters by default
    dropouts: ClassVar[tuple[str, ...]]  # keys of Transformers' config that are a dropout's probability
    # Attentions that it can be computed with, of sdpa, matmul and eager. The first is what a model is built with;
    # matmul is for those whose attention adds nothing but a mask to the scores.
    attentions: ClassVar[tuple[str, ...]] = ("sdpa", "eager")
    separators: ClassVar[int] = 1  # [SEP]s between two texts
    unused_positions: ClassVar[int] = 0  # of max_position_embeddings, which no text can have
    embeddings: ClassVar[tuple[str, ...]] = ()  # more parts of parameters' names that are frozen with the embeddings

    @property
    def name(self) -> str:
        """The one word that its section allows as `architecture`."""
        return str(get_args(self.section.model_fields["architecture"].annotation)[0])

    @property
    def origins(self) -> tuple[str, ...]:
        """Kinds of pretrained model (`model_type` in config.json) that it starts from."""
        return (self.name,)

    @abstractmethod
    def shape(self, config: Mapping[str, Any]) -> Shape:
        """The shape that a Transformers config describes; see `complete` for the keys that it leaves out."""

    def recipe_shape(self, model: ModelKeys, config: Mapping[str, Any]) -> Shape:
        """The shape of a recipe's model of this config; other keys of the section may matter too."""
        return self.shape(config)

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of `config`; those which a Transformers config leaves out have the architecture's defaults."""
        defaults = self.config()
        return defaults.model_dump() | {key: value for key, value in config.items() if key in self.config.model_fields}

    def linear_names(self) -> list[str]:
        """The linear layers that any layer has, by their names within it."""
        return list(dict.fromkeys(name for linears in self.linears for name in linears))


class EncoderArchitecture(Architecture):
    """An encoder, for masked language modelling and for heads on it."""

    head_modules: ClassVar[tuple[str, ...]]  # of the masked-LM model; applied in turn to hidden states they give logits
    # Of the model for pretraining with pairs: the pooler, which takes the first token of each row, and the head on it.
    pair_modules: ClassVar[tuple[str, str] | None] = None
    takes_packed_rows: ClassVar[bool] = True  # whether documents that share a row can be kept apart
    # Keys of the config that are bases of rotary positions, which phases may change, by the kind of layer they are of.
    rotary_bases: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def shape(self, config: Mapping[str, Any]) -> EncoderShape:
        """See `Architecture`."""

    def encode_packed(self, model: "PreTrainedModel", rows: PackedRows) -> "Tensor":
        """Hidden states (rows, tokens, hidden_size) of packed rows, no document seeing another.

        Args:
            model: Transformers' masked-LM model.
            rows: see there.
        """
        return encode_rows(model, rows, additive_mask(rows.same_document, model.dtype), rows.position_ids)

    def predict_tokens(self, model: "PreTrainedModel", hidden: "Tensor") -> "Tensor":
        """Run the masked-LM head: hidden states (n, hidden_size) → logits (n, vocab_size)."""
        for name in self.head_modules:
            hidden = model.get_submodule(name)(hidden)
        return hidden


class Seq2SeqArchitecture(Architecture):
    """An encoder with a decoder, which writes a text from a text."""

    config_keys: ClassVar[Mapping[str, Any]] = {}  # more keys of Transformers' config of a new model

    @abstractmethod
    def shape(self, config: Mapping[str, Any]) -> Seq2SeqShape:
        """See `Architecture`."""

    def new_config(
        self, model: ModelKeys, special_ids: Mapping[str, int], decoder_start: Mapping[str, int]
    ) -> "PreTrainedConfig":
        """Transformers' config of a model of `model.config`.

        Args:
            model: the recipe's section.
            special_ids: `pad_token_id` and its like, from the tokenizer.
            decoder_start: `decoder_start_token_id`.
        """
        from transformers import AutoConfig

        assert model.config is not None
        keys = {**model.config.model_dump(), **special_ids, **decoder_start, **self.config_keys}
        config: PreTrainedConfig = AutoConfig.for_model(self.name, **keys)
        return config

    def sides(self, config: Any) -> Sequence[Any]:
        """The configs that hold a model's sizes and dropouts: its own, or one for each side."""
        return (config,)

    def start_from_encoder(
        self, model: ModelKeys, config: Any, folder: "Path", special_ids: Mapping[str, int], keys: Mapping[str, Any]
    ) -> "PreTrainedModel | None":
        """A model made of a pretrained encoder, where `config` is one's; None where it is that of a whole model.

        Args:
            model: the recipe's section.
            config: of the folder.
            folder: the encoder's.
            special_ids: `decoder_start_token_id` among them.
            keys: of `from_pretrained`.
        """
        return None
