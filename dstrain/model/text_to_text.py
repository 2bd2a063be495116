"""Encoders with a decoder, built from a recipe."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
)

from dstrain.architectures import ModelKeys, dropout_keys, seq2seq_architecture
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import UserError
from dstrain.model.lora import add_adapters
from dstrain.plan.attention import initial_attention
from dstrain.recipe.schema import Decoding


def build_text_to_text(model: ModelKeys, seed: int, encoder: DocumentTokenizer) -> PreTrainedModel:
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


def _decoder_start(encoder: DocumentTokenizer) -> dict[str, int]:
    return {"decoder_start_token_id": encoder.begin[0] if encoder.begin else encoder.pad_id}


def _from_config(model: ModelKeys, encoder: DocumentTokenizer) -> PreTrainedModel:
    architecture = seq2seq_architecture(model.architecture)
    config = architecture.new_config(model, encoder.special_token_ids, _decoder_start(encoder))
    built: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation=initial_attention(model), dtype=torch.float32
    )
    return built


def _from_folder(model: ModelKeys, folder: Path, encoder: DocumentTokenizer) -> PreTrainedModel:
    architecture = seq2seq_architecture(model.architecture)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in architecture.origins:
        raise UserError(
            f"model.architecture={model.architecture}, but {folder} holds a {config.model_type}; "
            f"give a folder with {' or '.join(architecture.origins)}"
        )
    keys: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": initial_attention(model),
        "local_files_only": True,
    }
    for side in architecture.sides(config):
        side.update(dropout_keys(model))
    ids = encoder.special_token_ids | _decoder_start(encoder)
    started = architecture.start_from_encoder(model, config, folder, ids, keys)
    if started is not None:
        return started
    built: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(folder, config=config, **keys)
    # Folders of older versions say it in the one, those of newer in the other.
    generated = built.generation_config.decoder_start_token_id
    known = built.config.decoder_start_token_id if hasattr(built.config, "decoder_start_token_id") else None
    built.config.decoder_start_token_id = next(
        start for start in (generated, known, ids["decoder_start_token_id"]) if start is not None
    )
    built.config.eos_token_id, built.config.pad_token_id = ids["eos_token_id"], ids["pad_token_id"]
    return built
