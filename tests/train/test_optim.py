"""Decay groups, clipping, and rates by layer."""

import math

import pytest
import torch
from torch import nn

from dstrain.errors import RecipeError
from dstrain.optimizers.adamw import AdamWSection
from dstrain.train.optim import build_optimizer, freeze, parameter_groups

PLAIN = AdamWSection(learning_rate=1.0, weight_decay=0.1)
BY_LAYER = AdamWSection(learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)


def test_matrices_decay_biases_and_norms_do_not_and_frozen_ones_are_left_alone() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    module[1].bias.requires_grad = False
    decayed, plain = parameter_groups(module, PLAIN)
    assert [p.shape for p in decayed["params"]] == [(5, 4), (4, 4)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    module.requires_grad_(False)[2].weight.requires_grad = True
    assert [len(group["params"]) for group in parameter_groups(module, PLAIN)] == [1]


def test_the_clipping_optimizer_clips_reports_and_refuses() -> None:
    module = nn.Linear(3, 1, bias=False)
    optimizer = build_optimizer(module, AdamWSection(learning_rate=0.1, betas=(0.0, 0.9)), clip_grad_norm=1.0)
    module.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(5.0)
    torch.testing.assert_close(optimizer.state[module.weight]["exp_avg"], torch.tensor([[0.6, 0.0, 0.8]]))

    before = module.weight.detach().clone()
    module.weight.grad = torch.tensor([[1.0, math.nan, 0.0]])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(module.weight, before)
    assert optimizer.state[module.weight]["step"] == 1

    module.weight.grad = torch.tensor([[0.0, 0.0, 0.5]])
    optimizer.step()
    assert not optimizer.overflow
    assert optimizer.state[module.weight]["exp_avg"].tolist() == [[0.0, 0.0, 0.5]]


def test_a_parameter_that_took_no_part_decays_all_the_same() -> None:
    module = nn.ParameterList([torch.full((2, 2), 1.0), torch.full((2, 2), 1.0)])
    optimizer = build_optimizer(module, AdamWSection(learning_rate=0.1, weight_decay=0.5), clip_grad_norm=1.0)
    optimizer.param_groups[0]["lr"] = 0.1
    module[0].grad = torch.zeros(2, 2)
    optimizer.step()
    assert [float(part.detach().mean()) for part in module] == pytest.approx([0.95, 0.95])


def test_layers_learn_slower_the_further_they_are_from_the_head() -> None:
    from transformers import BertConfig, BertForTokenClassification

    sizes = {
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    }
    module = BertForTokenClassification(BertConfig(**sizes))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    shares = {
        names[id(parameter)]: group["rate_share"]
        for group in parameter_groups(module, BY_LAYER)
        for parameter in group["params"]
    }
    assert shares["classifier.weight"] == 1.0
    assert shares["bert.encoder.layer.1.output.dense.bias"] == 0.5
    assert shares["bert.encoder.layer.0.attention.self.query.weight"] == 0.25
    assert shares["bert.embeddings.word_embeddings.weight"] == 0.125
    assert shares.keys() == set(names.values())
    freeze(module, 1)
    left = {names[id(p)] for group in parameter_groups(module, BY_LAYER) for p in group["params"]}
    assert left == {name for name, share in shares.items() if share >= 0.5}
    with pytest.raises(RecipeError, match=r"model\.frozen_layers=3, and the model has 2 layers; use at most 2"):
        freeze(module, 3)
