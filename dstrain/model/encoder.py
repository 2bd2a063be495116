"""Transformers encoders, built from a recipe, with attention confined to the documents of a packed row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

import dstrain.model.attention  # noqa: F401  (Transformers learns a name)
from dstrain.architectures import ModelKeys, PackedRows, document_mask, dropout_keys, encoder_architecture
from dstrain.errors import UserError
from dstrain.model.lora import add_adapters
from dstrain.plan.attention import initial_attention

# Special ids of the tokenizer that the model's config has to know: pad, and for RoBERTa the shift of its positions.
SpecialIds = dict[str, int]


def build_model(
    model: ModelKeys,
    seed: int,
    special_ids: SpecialIds,
    *,
    auto: Any = AutoModelForMaskedLM,
    labels: Sequence[str] = (),
    **config_keys: Any,
) -> PreTrainedModel:
    """Build the Transformers model of a recipe in fp32, the same on every rank, with its adapters where it has some.

    Args:
        model: the recipe's `model` section.
        seed: `train.seed`; decides the initial weights and nothing else.
        special_ids: `pad_token_id` and its like, from the tokenizer.
        auto: the class of Transformers that puts the head on the encoder.
        labels: names of a classification head's outputs.
        config_keys: more keys of the Transformers config.

    Raises:
        UserError: the pretrained folder cannot be used.
    """
    torch.manual_seed(seed)
    attention = initial_attention(model)
    extra: dict[str, Any] = {**dropout_keys(model), **config_keys}
    if labels:
        extra["id2label"] = dict(enumerate(labels))
        extra["label2id"] = {label: index for index, label in enumerate(labels)}
    built: PreTrainedModel
    if model.pretrained is not None:
        try:
            built = auto.from_pretrained(
                Path(model.pretrained),
                attn_implementation=attention,
                dtype=torch.float32,
                local_files_only=True,
                **extra,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model.pretrained={model.pretrained} cannot be loaded: {error}; "
                f"give a Transformers folder with config.json and *.safetensors (`dstrain ckpt export` makes one)"
            ) from error
        if built.config.model_type != model.architecture:
            raise UserError(
                f"model.architecture={model.architecture}, but {model.pretrained} holds a {built.config.model_type}; "
                f"set model.architecture: {built.config.model_type}"
            )
    else:
        assert model.config is not None, "a valid recipe has model.config or model.pretrained"
        config = AutoConfig.for_model(model.architecture, **model.config.model_dump(), **special_ids, **extra)
        built = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if model.lora is not None:
        add_adapters(built, model.lora, model.architecture, seed)
    return built


def build_again(model: ModelKeys, seed: int, config: PreTrainedConfig, auto: Any) -> PreTrainedModel:
    """The model that `build_model` built, from the config that it had then.

    Raises:
        UserError: the pretrained folder cannot be used.
    """
    torch.manual_seed(seed)
    built: PreTrainedModel
    if model.pretrained is None:
        built = auto.from_config(config, dtype=torch.float32)
    else:
        try:
            built = auto.from_pretrained(
                Path(model.pretrained), config=config, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model.pretrained={model.pretrained}, whose weights are not in the checkpoints, cannot be loaded: "
                f"{error}; put the folder back"
            ) from error
    if model.lora is not None:
        add_adapters(built, model.lora, model.architecture, seed)
    return built


def labels_of_head(model: ModelKeys, auto: Any, labels: list[str]) -> list[str]:
    """The labels in the order of a head that the pretrained folder already has, or as they are where it has none.

    Args:
        model: the recipe's `model` section.
        auto: the class of Transformers for the head.
        labels: those of the task.

    Raises:
        UserError: it has such a head, for other labels.
    """
    if model.pretrained is None:
        return labels
    try:
        config = json.loads((Path(model.pretrained) / "config.json").read_bytes())
    except (OSError, ValueError):
        return labels  # `build_model` says what is wrong with the folder
    kind = auto.__name__.removeprefix("AutoModel")
    if not any(name.endswith(kind) for name in config.get("architectures") or []):
        return labels
    there = list(config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).values())
    if sorted(there) == sorted(labels):
        return there
    if len(there) == len(labels) and all(name == f"LABEL_{number}" for number, name in enumerate(there)):
        return labels  # it has no names of its own
    raise UserError(
        f"model.pretrained={model.pretrained} has a head of {len(there)} labels ({_listed(there)}), and the examples "
        f"have {len(labels)} ({_listed(labels)}); train on its labels (data.labels), or start from the encoder that "
        f"it was made from"
    )


def _listed(labels: Sequence[str], most: int = 5) -> str:
    return ", ".join(labels[:most]) + (", …" if len(labels) > most else "")


def predict_tokens(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Run the masked-LM head: hidden states (n, hidden_size) → logits (n, vocab_size)."""
    return encoder_architecture(model.config.model_type).predict_tokens(model, hidden)


def predict_pairs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Run the head for pairs: hidden states of their [CLS] (n, hidden_size) → logits (n, 2)."""
    modules = encoder_architecture(model.config.model_type).pair_modules
    assert modules is not None, "a valid recipe has pairs only for an architecture with a head for them"
    pooler, head = modules
    pooled = model.get_submodule(pooler)(hidden[:, None])  # which takes the first token of each
    logits: Tensor = model.get_submodule(head)(pooled)
    return logits


def encode_packed(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, **token_types: Tensor) -> Tensor:
    """Hidden states (rows, tokens, hidden_size) of packed rows, no document seeing another.

    Args:
        model: a masked-LM model of an `EncoderArchitecture`.
        input_ids: int64 (rows, tokens).
        position_ids: int64 (rows, tokens), 0 at the first token of every document in the row.
        token_types: as `token_type_ids`, int64 (rows, tokens); without, all are of type 0.
    """
    rows = PackedRows(input_ids, position_ids, document_mask(position_ids), token_types)
    return encoder_architecture(model.config.model_type).encode_packed(model, rows)
