"""Attention by matrix products computes what torch's own does, as exactly in bf16."""

import pytest
import torch
from tiny_models import masked_batch, tiny_model
from torch import Tensor, nn

from dstrain.architectures import additive_mask, document_mask
from dstrain.model.attention import matmul_attention
from dstrain.model.sparse import SparseMaskedLm

ROWS, HEADS, TOKENS, WIDTH = 2, 3, 48, 16


def attention_and_gradients(how: str, precision: torch.dtype, inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    """The output (rows, tokens, heads, width) and the gradients of query, key and value, in float64."""
    leaves = [tensor.to(precision).requires_grad_() for tensor in inputs[:3]]
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)  # strided, as a model's are
    added = mask.to(precision)
    if how == "matmul":
        output, _ = matmul_attention(nn.Identity(), query, key, value, added)
    else:
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=added).transpose(1, 2)
    output.backward(inputs[3].to(precision))
    return [output.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def example(sharpness: float) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and the output's gradient (rows, tokens, heads, width), exact in bf16; two documents a row."""
    torch.manual_seed(0)
    inputs = [torch.randn(ROWS, TOKENS, HEADS, WIDTH) for _ in range(4)]
    inputs[0] *= sharpness
    positions = torch.arange(TOKENS).remainder(TOKENS // 2).expand(ROWS, -1)
    return [tensor.bfloat16().float() for tensor in inputs], additive_mask(document_mask(positions), torch.float32)


def test_it_computes_what_torchs_own_computes() -> None:
    inputs, mask = example(2.0)
    for found, wanted in zip(
        attention_and_gradients("matmul", torch.float64, inputs, mask),
        attention_and_gradients("sdpa", torch.float64, inputs, mask),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # its scores are in fp32


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_in_bf16_it_is_about_as_exact_as_torchs_own(sharpness: float) -> None:
    """Scores that were rounded to bf16 would be several times as far off."""
    inputs, mask = example(sharpness)
    exact = attention_and_gradients("sdpa", torch.float64, inputs, mask)
    ours, torchs = (
        [
            float((found - wanted).norm() / wanted.norm())
            for found, wanted in zip(attention_and_gradients(how, torch.bfloat16, inputs, mask), exact, strict=True)
        ]
        for how in ("matmul", "sdpa")
    )
    assert max(ours) < 0.01
    assert all(mine < 1.6 * its for mine, its in zip(ours, torchs, strict=True)), (ours, torchs)


def test_dropout_is_of_the_probabilities_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, ROWS, HEADS, TOKENS, WIDTH)
    ones = torch.ones(ROWS, HEADS, TOKENS, WIDTH)
    kept, _ = matmul_attention(nn.Identity(), query, key, ones, None)
    torch.testing.assert_close(kept, torch.ones_like(kept))
    dropped, _ = matmul_attention(nn.Identity(), query, key, ones, None, dropout=0.5)
    assert dropped.std() > 0.05
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)  # 288 sums of 48 probabilities each


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.slow
def test_a_model_with_it_has_the_losses_and_gradients_of_one_without(architecture: str) -> None:
    batch = masked_batch((5, 17, 10), (32,), predicted=(4, 6))
    found = {}
    for attention in ("sdpa", "matmul"):
        model = tiny_model(architecture, attention=attention)
        loss, _ = SparseMaskedLm(model)(**batch)
        loss.backward()
        found[attention] = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["matmul"], found["sdpa"], rtol=1e-4, atol=1e-5)


def test_an_exported_config_does_not_name_it() -> None:
    model = tiny_model("bert", attention="matmul")
    assert model.config._attn_implementation == "matmul"
    assert "matmul" not in model.config.to_json_string()
