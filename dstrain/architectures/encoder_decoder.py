"""Two BERTs or RoBERTas (Rothe et al. 2020): the decoder has embeddings of its own and a masked-LM head."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dstrain.architectures import (
    ModelKeys,
    Seq2SeqArchitecture,
    Seq2SeqShape,
    decoder_linears,
    encoder_architecture,
    renamed_linears,
)
from dstrain.architectures.bert import ARCHITECTURE as BERT
from dstrain.architectures.bert import LINEARS, BertConfig
from dstrain.architectures.roberta import ARCHITECTURE as ROBERTA
from dstrain.base.section import PositiveInt
from dstrain.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel


class EncoderDecoderModel(ModelKeys):
    """A BERT or RoBERTa on both sides (Rothe et al. 2020), the decoder with causal and cross attention.

    `pretrained` is such an encoder, of which both sides start (cross attention is new), or a whole such model;
    `config` is BERT's, for both. The decoder has the first `decoder_layers` of the encoder's layers; null: all.
    """

    architecture: Literal["encoder-decoder"]
    config: BertConfig | None = None
    decoder_layers: PositiveInt | None = None


class EncoderDecoder(Seq2SeqArchitecture):
    """See the file."""

    section = EncoderDecoderModel
    config = BertConfig
    linears = (LINEARS, decoder_linears(LINEARS, renamed_linears(LINEARS, "attention.", "crossattention.")))
    lora_targets = ("query", "value")
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")

    @property
    def origins(self) -> tuple[str, ...]:
        """See `Architecture`: an encoder, or a whole model."""
        return (BERT.name, ROBERTA.name, self.name)

    def shape(self, config: Mapping[str, Any]) -> Seq2SeqShape:
        """See `Architecture`: of a whole model, or of two such encoders."""
        if "encoder" in config:
            return self._joined(config["encoder"], int(config["decoder"]["num_hidden_layers"]))
        return self._joined(config, None)

    def recipe_shape(self, model: ModelKeys, config: Mapping[str, Any]) -> Seq2SeqShape:
        """See `Architecture`: the decoder may have fewer layers."""
        assert isinstance(model, EncoderDecoderModel)
        return self.shape(config) if "encoder" in config else self._joined(config, model.decoder_layers)

    def _joined(self, config: Mapping[str, Any], decoder_layers: int | None) -> Seq2SeqShape:
        sizes = encoder_architecture(config.get("model_type", BERT.name)).complete(config)
        hidden = sizes["hidden_size"]
        return Seq2SeqShape(
            architecture=self.name,
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

    def new_config(
        self, model: ModelKeys, special_ids: Mapping[str, int], decoder_start: Mapping[str, int]
    ) -> "PreTrainedConfig":
        """See `Seq2SeqArchitecture`."""
        from transformers import AutoConfig, EncoderDecoderConfig

        assert isinstance(model, EncoderDecoderModel) and model.config is not None
        sizes = model.config.model_dump()
        sides = [AutoConfig.for_model(BERT.name, **sizes, **special_ids) for _ in range(2)]
        sides[1].num_hidden_layers = model.decoder_layers or sizes["num_hidden_layers"]
        config: PreTrainedConfig = EncoderDecoderConfig.from_encoder_decoder_configs(
            *sides, **special_ids, **decoder_start
        )
        return config

    def sides(self, config: Any) -> Sequence[Any]:
        """See `Seq2SeqArchitecture`."""
        return (config.encoder, config.decoder) if config.model_type == self.name else (config,)

    def start_from_encoder(
        self, model: ModelKeys, config: Any, folder: "Path", special_ids: Mapping[str, int], keys: Mapping[str, Any]
    ) -> "PreTrainedModel | None":
        """See `Seq2SeqArchitecture`. Cross attention, and a head that the folder lacks, are new."""
        from transformers import AutoModel, AutoModelForCausalLM, EncoderDecoderConfig
        from transformers import EncoderDecoderModel as TransformersModel

        assert isinstance(model, EncoderDecoderModel)
        if config.model_type == self.name:
            return None
        layers = model.decoder_layers or config.num_hidden_layers
        if layers > config.num_hidden_layers:
            raise UserError(
                f"model.decoder_layers={layers}, and {folder} has {config.num_hidden_layers} layers; use at most these"
            )
        writes = copy.deepcopy(config)
        writes.update({"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": layers})
        first = AutoModel.from_pretrained(folder, config=config, **keys)
        second = AutoModelForCausalLM.from_pretrained(folder, config=writes, **keys)
        joined = EncoderDecoderConfig.from_encoder_decoder_configs(first.config, second.config, **special_ids)
        return TransformersModel(encoder=first, decoder=second, config=joined)


ARCHITECTURE = EncoderDecoder()
