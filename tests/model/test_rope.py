"""Positions that change in place: as if the model had been built with them, and back again."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from dstrain.model.rope import RotaryKeys

SHORT = {"global_rope_theta": 10_000.0, "local_rope_theta": 5_000.0, "max_position_embeddings": 32}
LONG = {"global_rope_theta": 160_000.0, "max_position_embeddings": 64}
IDS = torch.arange(40)[None] % 32


def build(architecture: str = "modernbert", **keys: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    special_ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    config = AutoConfig.for_model(architecture, **sizes, intermediate_size=24, **special_ids, **keys)
    model: PreTrainedModel = AutoModelForMaskedLM.from_config(config).eval()
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def test_a_changed_model_is_one_that_was_built_so_and_can_be_changed_back() -> None:
    model = build(**SHORT, local_attention=8)
    before, keys = logits(model), RotaryKeys.of(model)
    assert keys.values == SHORT
    frequencies = model.base_model.rotary_emb.full_attention_inv_freq
    keys.set_on(model, LONG)
    longer = build(**{**SHORT, **LONG}, local_attention=8)
    assert torch.equal(logits(model), logits(longer))
    assert not torch.equal(logits(model), before)
    assert model.config.to_dict() == longer.config.to_dict()
    assert model.base_model.rotary_emb.full_attention_inv_freq is frequencies, "what was compiled still sees it"
    keys.set_on(model, {})
    assert torch.equal(logits(model), before)
    assert RotaryKeys.of(model) == keys


def test_frequencies_stay_exact_in_a_model_of_bf16_weights() -> None:
    """DeepSpeed casts the parameters and leaves the buffers."""
    model = build(**SHORT)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    RotaryKeys.of(model).set_on(model, LONG)
    assert model.base_model.rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_other_models_have_no_such_keys() -> None:
    model = build("bert")
    keys = RotaryKeys.of(model)
    assert not keys.values
    keys.set_on(model, {})
    with pytest.raises(AssertionError, match="bert has none of"):
        keys.set_on(model, LONG)
