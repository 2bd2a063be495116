"""Tiny models of every architecture, and packed rows for them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dstrain.architectures import ModelKeys
from dstrain.architectures.bert import BertConfig, BertModel
from dstrain.architectures.modernbert import ModernBertConfig, ModernBertModel
from dstrain.architectures.roberta import RobertaConfig, RobertaModel
from dstrain.model.encoder import build_model

VOCABULARY = 96
FIRST_ID = 5  # of an ordinary token
SPECIAL_IDS = {"pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
ARCHITECTURES = ("bert", "roberta", "modernbert")
ROW_TOKENS = 32
MASKED = 6  # slots for predictions in a row


def recipe_model(architecture: str, *, dropout: float = 0.0, **keys: Any) -> ModelKeys:
    """A recipe's `model` section: 4 layers of 32, rows of up to 32 tokens; modernbert sees 4 tokens to each side."""
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4}
    shared |= {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": ROW_TOKENS + 2}
    bert_like = shared | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if architecture == "bert":
        return BertModel(architecture="bert", config=BertConfig(**bert_like), **keys)
    if architecture == "roberta":
        return RobertaModel(architecture="roberta", config=RobertaConfig(**bert_like), **keys)
    modern = shared | {"mlp_dropout": dropout, "attention_dropout": dropout, "embedding_dropout": dropout}
    config = ModernBertConfig(**modern, local_attention=8, global_attn_every_n_layers=3)
    return ModernBertModel(architecture="modernbert", config=config, **keys)


def tiny_model(architecture: str, *, seed: int = 0, dropout: float = 0.0, **keys: Any) -> PreTrainedModel:
    """A model with weights large enough that every token matters, in eval mode where there is no dropout."""
    model = build_model(recipe_model(architecture, dropout=dropout, **keys), seed, SPECIAL_IDS)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train(dropout > 0)


def packed_rows(*document_lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids, both (rows, 32), of rows that hold documents of these lengths."""
    for lengths in document_lengths:
        assert sum(lengths) == ROW_TOKENS
    draw = np.random.default_rng(seed)
    input_ids = torch.from_numpy(draw.integers(FIRST_ID, VOCABULARY, (len(document_lengths), ROW_TOKENS)))
    positions = [np.concatenate([np.arange(length) for length in lengths]) for lengths in document_lengths]
    return input_ids, torch.from_numpy(np.stack(positions))


def masked_batch(*document_lengths: tuple[int, ...], predicted: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a micro-batch; `predicted` says how many of the `MASKED` slots each row fills."""
    input_ids, position_ids = packed_rows(*document_lengths, seed=seed)
    draw = np.random.default_rng(seed + 1)
    rows = len(predicted)
    masked_positions, labels = torch.zeros(rows, MASKED, dtype=torch.int64), torch.full((rows, MASKED), -100)
    for row, count in enumerate(predicted):
        positions = np.sort(draw.choice(ROW_TOKENS, count, replace=False))
        masked_positions[row, :count] = torch.from_numpy(positions)
        labels[row, :count] = torch.from_numpy(draw.integers(FIRST_ID, VOCABULARY, count))
    return {
        "input_ids": input_ids, "position_ids": position_ids, "masked_positions": masked_positions, "labels": labels,
    }  # fmt: skip


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name → gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients ÷ the norm of the second, over all parameters."""
    assert first.keys() == second.keys()
    apart = sum(float((first[name].double() - second[name].double()).square().sum()) for name in first)
    norm = sum(float(second[name].double().square().sum()) for name in second)
    return (apart / norm) ** 0.5
