"""Predicting the masked positions only is the same mathematics as predicting everywhere and ignoring the rest."""

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    MASKED,
    VOCABULARY,
    gradients,
    masked_batch,
    recipe_model,
    relative_difference,
    tiny_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstrain.architectures import document_mask
from dstrain.model.encoder import build_model
from dstrain.model.sparse import SparseMaskedLm

LENGTHS = ((5, 17, 10), (32,), (1, 1, 30))
PREDICTED = (MASKED, 2, 0)  # a full row, one with free slots, one with nothing to predict


def dense_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The model's own forward, head on every token; only the mask is ours, as Transformers takes it."""
    same_document = document_mask(batch["position_ids"])
    mask: Tensor | dict[str, Tensor] = same_document
    position_ids = batch["position_ids"]
    if model.config.model_type == "roberta":
        position_ids = position_ids + model.config.pad_token_id + 1
    if model.config.model_type == "modernbert":
        index = torch.arange(same_document.shape[-1])
        near = (index[:, None] - index).abs() <= model.config.local_attention // 2
        mask = {"full_attention": same_document, "sliding_attention": same_document & near}
    return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids).logits


def dense_labels(batch: dict[str, Tensor]) -> Tensor:
    """Labels (rows, tokens), -100 where nothing is predicted."""
    dense = torch.full_like(batch["input_ids"], -100)
    for row, (positions, labels) in enumerate(zip(batch["masked_positions"], batch["labels"], strict=True)):
        real = labels >= 0
        dense[row, positions[real]] = labels[real]
    return dense


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_sparse_and_dense_agree_in_loss_hits_and_gradients(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = masked_batch(*LENGTHS, predicted=PREDICTED)
    loss, right = SparseMaskedLm(model)(**batch)
    loss.backward()
    sparse = gradients(model)

    model.zero_grad()
    logits, labels = dense_logits(model, batch).view(-1, VOCABULARY), dense_labels(batch).view(-1)
    dense_loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    dense_loss.backward()
    torch.testing.assert_close(loss, dense_loss, rtol=1e-6, atol=0)
    assert relative_difference(sparse, gradients(model)) < 1e-6
    assert right == (logits.argmax(-1) == labels).sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_add_up_whatever_the_micro_batch(architecture: str) -> None:
    module = SparseMaskedLm(tiny_model(architecture))
    batch = masked_batch(*LENGTHS, predicted=PREDICTED)
    whole, _ = module(**batch)
    each = [module(**{name: tensor[row : row + 1] for name, tensor in batch.items()})[0] for row in range(3)]
    torch.testing.assert_close(whole, sum(each), rtol=1e-6, atol=0)
    assert each[2] == 0  # nothing to predict is no loss, not 0 ÷ 0


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(architecture: str, dropout: float, attention: str) -> None:
    batch = masked_batch(*LENGTHS, predicted=PREDICTED)
    found = []
    for checkpointing in (False, True, False):
        model = tiny_model(architecture, dropout=dropout, attention=attention).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        torch.manual_seed(4)
        loss, _ = SparseMaskedLm(model)(**batch)
        loss.backward()
        found.append((loss, gradients(model)))
    (plain_loss, plain), (loss, checkpointed), _ = found
    assert torch.equal(loss, plain_loss)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    if dropout:
        torch.manual_seed(5)
        assert not torch.equal(SparseMaskedLm(model)(**batch)[0], loss)


def test_a_bf16_model_is_scored_in_fp32() -> None:
    model = tiny_model("bert").bfloat16()
    loss, right = SparseMaskedLm(model)(**masked_batch(*LENGTHS, predicted=PREDICTED))
    assert loss.dtype == right.dtype == torch.float32


def test_models_are_built_in_fp32_with_the_attention_that_is_asked_for() -> None:
    for attention in ("sdpa", "matmul", "eager"):
        model = build_model(recipe_model("bert", attention=attention), 0, {"pad_token_id": 0})
        assert model.dtype == torch.float32
        assert model.config._attn_implementation == attention
