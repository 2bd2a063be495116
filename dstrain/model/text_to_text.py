"""Encoders with a decoder, built from a recipe: T5, BART, Marian, and two of a pretrained encoder joined."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dstrain.architectures.keys import EncoderDecoderModel as EncoderDecoderSection
from dstrain.architectures.keys import TextToTextModel
from dstrain.architectures.shape import dropout_keys
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import UserError
from dstrain.model.lora import add_adapters
from dstrain.plan.attention import initial_attention
from dstrain.recipe.files import ENCODER_DECODER, origins
from dstrain.recipe.schema import Decoding


def build_text_to_text(model: TextToTextModel, seed: int, encoder: DocumentTokenizer) -> PreTrainedModel:
    """Build the Transformers model of a recipe in fp32, the same on every rank.

    The decoder begins with what the pretrained model began with; in a new one with the token that begins a text, or
    with padding where the tokenizer has no such token, as in T5 and Marian.

    Args:
        model: the recipe's `model` section.
        seed: `train.seed`; decides the initial weights and nothing else.
        encoder: the tokenizer, of sources and targets alike.

    Raises:
        UserError: the pretrained folder cannot be used.
    """
    torch.manual_seed(seed)
    if model.pretrained is None:
        built = _from_config(model, encoder)
    else:
        try:
            built = _from_folder(model, Path(model.pretrained), encoder)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"model.pretrained={model.pretrained} cannot be loaded: {error}; "
                f"give a Transformers folder with config.json and *.safetensors (`dstrain ckpt export` makes one)"
            ) from error
    there = built.get_input_embeddings().num_embeddings
    if there < encoder.vocab_size:
        raise UserError(
            f"the model knows {there} tokens and the tokenizer {encoder.vocab_size}; give the tokenizer that "
            f"belongs to model.pretrained={model.pretrained}"
        )
    pooler = getattr(getattr(built, "encoder", None), "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)  # nothing reads it
    if model.lora is not None:
        add_adapters(built, model.lora, model.architecture, seed)
    return built


def decoder_start(config: Any) -> int:
    """The id that a decoder begins with."""
    start = config.decoder_start_token_id
    assert isinstance(start, int), "a model is built with it"
    return start


def generation_config(config: Any, decoding: Decoding, target_length: int) -> GenerationConfig:
    """How a model writes: beam search up to `target_length` tokens, the last of which ends the text."""
    beams = {"length_penalty": decoding.length_penalty, "early_stopping": False} if decoding.num_beams > 1 else {}
    return GenerationConfig(
        num_beams=decoding.num_beams,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        max_new_tokens=target_length,
        min_new_tokens=decoding.min_new_tokens or None,
        do_sample=False,
        decoder_start_token_id=decoder_start(config),
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        **beams,
    )


def _special_ids(encoder: DocumentTokenizer) -> dict[str, int]:
    start = encoder.begin[0] if encoder.begin else encoder.pad_id
    return encoder.special_token_ids | {"decoder_start_token_id": start}


def _from_config(model: TextToTextModel, encoder: DocumentTokenizer) -> PreTrainedModel:
    assert model.config is not None, "a valid recipe has model.config or model.pretrained"
    sizes, ids = model.config.model_dump(), _special_ids(encoder)
    if isinstance(model, EncoderDecoderSection):
        sides = [AutoConfig.for_model("bert", **sizes, **encoder.special_token_ids) for _ in range(2)]
        sides[1].num_hidden_layers = model.decoder_layers or sizes["num_hidden_layers"]
        config: Any = EncoderDecoderConfig.from_encoder_decoder_configs(*sides, **ids)
    else:
        forced = {} if model.architecture == "t5" else {"forced_eos_token_id": None}  # another vocabulary's
        config = AutoConfig.for_model(model.architecture, **sizes, **ids, **forced)
    built: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation=initial_attention(model.attention), dtype=torch.float32
    )
    return built


def _from_folder(model: TextToTextModel, folder: Path, encoder: DocumentTokenizer) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in origins(model.architecture):
        raise UserError(
            f"model.architecture={model.architecture}, but {folder} holds a {config.model_type}; "
            f"give a folder with {' or '.join(origins(model.architecture))}"
        )
    keys: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": initial_attention(model.attention),
        "local_files_only": True,
    }
    for side in (config.encoder, config.decoder) if config.model_type == ENCODER_DECODER else (config,):
        side.update(dropout_keys(model))
    if isinstance(model, EncoderDecoderSection) and config.model_type != ENCODER_DECODER:
        return _warm_started(model, config, folder, encoder, keys)
    built: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(folder, config=config, **keys)
    # Folders of older versions say it in the one, those of newer in the other.
    started = built.generation_config.decoder_start_token_id
    ids = _special_ids(encoder)
    known = built.config.decoder_start_token_id if hasattr(built.config, "decoder_start_token_id") else None
    built.config.decoder_start_token_id = next(
        one for one in (started, known, ids["decoder_start_token_id"]) if one is not None
    )
    built.config.eos_token_id, built.config.pad_token_id = ids["eos_token_id"], ids["pad_token_id"]
    return built


def _warm_started(
    model: EncoderDecoderSection,
    config: PreTrainedConfig,
    folder: Path,
    encoder: DocumentTokenizer,
    keys: dict[str, Any],
) -> PreTrainedModel:
    """Both sides from one encoder (Rothe et al. 2020). Cross attention, and a head that the folder lacks, are new."""
    layers = model.decoder_layers or config.num_hidden_layers
    if layers > config.num_hidden_layers:
        raise UserError(
            f"model.decoder_layers={layers}, and {folder} has {config.num_hidden_layers} layers; use at most these"
        )
    writes = copy.deepcopy(config)
    writes.update({"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": layers})
    first = AutoModel.from_pretrained(folder, config=config, **keys)
    second = AutoModelForCausalLM.from_pretrained(folder, config=writes, **keys)
    joined = EncoderDecoderConfig.from_encoder_decoder_configs(first.config, second.config, **_special_ids(encoder))
    return EncoderDecoderModel(encoder=first, decoder=second, config=joined)
