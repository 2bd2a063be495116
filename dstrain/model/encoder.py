"""Transformers encoders, built from a recipe, with attention confined to the documents of a packed row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

import dstrain.model.attention  # noqa: F401  (Transformers learns a name)
from dstrain.architectures.keys import Model
from dstrain.architectures.shape import dropout_keys
from dstrain.errors import UserError
from dstrain.model.lora import add_adapters
from dstrain.plan.attention import initial_attention

# Special ids of the tokenizer that the model's config has to know: pad, and for RoBERTa the shift of its positions.
SpecialIds = dict[str, int]


@dataclass(frozen=True)
class Architecture:
    """Where a Transformers masked-LM model of this kind keeps its prediction head, and how it takes packed rows."""

    head_modules: tuple[str, ...]  # applied in turn to hidden states, they give logits
    windowed: bool = False  # some layers attend within a sliding window
    positions_shifted: bool = False  # position 0 is embedded at index pad_token_id + 1


ARCHITECTURES = {
    "bert": Architecture(("cls.predictions",)),
    "roberta": Architecture(("lm_head",), positions_shifted=True),
    "modernbert": Architecture(("head", "decoder"), windowed=True),
}


def build_model(
    model: Model,
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
    attention = initial_attention(model.attention)
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


def build_again(model: Model, seed: int, config: PreTrainedConfig, auto: Any) -> PreTrainedModel:
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


def labels_of_head(model: Model, auto: Any, labels: list[str]) -> list[str]:
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
    for name in ARCHITECTURES[model.config.model_type].head_modules:
        hidden = model.get_submodule(name)(hidden)
    return hidden


def predict_pairs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Run BertForPreTraining's head for pairs: hidden states of their [CLS] (n, hidden_size) → logits (n, 2)."""
    pooled = model.get_submodule("bert.pooler")(hidden[:, None])  # which takes the first token of each
    logits: Tensor = model.get_submodule("cls.seq_relationship")(pooled)
    return logits


def encode_packed(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, **token_types: Tensor) -> Tensor:
    """Hidden states (rows, tokens, hidden_size) of packed rows, no document seeing another.

    Args:
        model: a masked-LM model of one of `ARCHITECTURES`.
        input_ids: int64 (rows, tokens).
        position_ids: int64 (rows, tokens), 0 at the first token of every document in the row.
        token_types: as `token_type_ids`, int64 (rows, tokens); without, all are of type 0.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    same_document = document_mask(position_ids)
    if architecture.positions_shifted:
        position_ids = position_ids + model.config.pad_token_id + 1
    mask: Any = additive_mask(same_document, model.dtype)
    if architecture.windowed:
        near = same_document & _window(model, input_ids)
        mask = {"full_attention": mask, "sliding_attention": additive_mask(near, model.dtype)}
    outputs = model.base_model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, **token_types)
    hidden: Tensor = outputs.last_hidden_state
    return hidden


def document_mask(position_ids: Tensor) -> Tensor:
    """Bool (rows, 1, tokens, tokens): True where both tokens are of one document. Documents start at position 0."""
    document = (position_ids == 0).cumsum(dim=1)  # (rows, tokens)
    return (document[:, :, None] == document[:, None, :])[:, None]


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed and -inf elsewhere, in the dtype of the scores that it is added to.

    Eager attention would add a boolean mask as 0 and 1, and hide nothing. SDPA would turn it into this one in every
    layer, and keep each of them for the backward pass.
    """
    mask = torch.zeros_like(allowed, dtype=dtype)
    mask[~allowed] = -torch.inf
    return mask


def _window(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Bool (tokens, tokens): True within the sliding window, both ends included."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    distance = (index[:, None] - index[None, :]).abs()
    return distance <= int(model.config.sliding_window)
