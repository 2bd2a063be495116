"""Low-rank adapters (Hu et al. 2022) in a model, by peft: put in, told apart from their base, and merged into it.

    layer(x) = base(x) + alpha ÷ rank × B(A(dropout(x)))        A random, B zero: at first it computes what it did

The base, which is everything below the head but the adapters, is frozen and in no checkpoint: it is built again from
`model.pretrained` (or from the seed), and `base_digest` tells whether it is the same.
"""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dstrain.architectures import Lora, is_target, lora_targets
from dstrain.base.counter_rng import stream_key
from dstrain.errors import UserError
from dstrain.model.depth import depth_of_parameters, embeddings_of, head_depth, within_layer

ADAPTER = "default"  # as peft calls the only one


def add_adapters(model: PreTrainedModel, lora: Lora, architecture: str, seed: int) -> None:
    """Put adapters beside the linear layers that `lora` names. They and what comes after the last layer are trained."""
    from peft import LoraModel

    unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    torch.manual_seed(int(stream_key(seed, "lora")) >> 1)
    LoraModel(model, lora_config(model, lora, architecture), ADAPTER)
    names = [name for name, _ in model.named_parameters()]
    depths, top = depth_of_parameters(names, embeddings_of(model)), head_depth(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((depths[name] == top and name not in unused) or is_adapter(name))


def lora_config(model: nn.Module, lora: Lora, architecture: str) -> Any:
    """peft's configuration, with whole names: ends of names would catch some outside of layers too."""
    from peft import LoraConfig

    targets = lora_targets(architecture, lora)
    modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_target(within_layer(name), targets)
    ]
    if not modules:
        raise UserError(f"model.lora.target_modules={list(targets)}: this model has no such linear layer in its layers")
    alpha: Any = lora.alpha  # peft says that it is whole, and divides it by the rank
    return LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=modules)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has any."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def base_identity(model: nn.Module) -> dict[str, str]:
    """{"base": digest of the names and weights of the frozen base}; {} of a model without adapters."""
    if not has_adapters(model):
        return {}
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            total.update(name.encode())
            total.update(parameter.detach().numpy().tobytes())
    return {"base": total.hexdigest()}


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each adapter's product to the weights beside it, in place, and take the adapters out."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
