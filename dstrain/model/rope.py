"""Rotary positions (Su et al. 2021) whose frequencies change while a model is trained: a longer context, another base.

ModernBERT's layers with global attention and those with a window have a base each. Its frequencies are buffers that no
checkpoint keeps: they follow from the config, which every checkpoint has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from dstrain.architectures import encoder_architecture


@dataclass(frozen=True)
class RotaryKeys:
    """The keys of a model's config that a phase may change, as recipes name them; none where no position is rotary."""

    values: Mapping[str, float | int]
    bases: Mapping[str, str]  # `EncoderArchitecture.rotary_bases`

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """As the model has them now."""
        config: Any = model.config
        bases = encoder_architecture(config.model_type).rotary_bases
        if not bases:
            return cls({}, bases)
        thetas = {key: config.rope_parameters[layers]["rope_theta"] for key, layers in bases.items()}
        return cls(thetas | {"max_position_embeddings": config.max_position_embeddings}, bases)

    @torch.no_grad()
    def set_on(self, model: PreTrainedModel, changes: Mapping[str, float | int]) -> None:
        """Give a model these keys, and in place of some of them `changes`: in its config, and as frequencies in place.

        Args:
            model: the one that the keys are of.
            changes: keys of the same names.
        """
        assert changes.keys() <= self.values.keys(), f"{model.config.model_type} has none of {list(changes)}"
        if not self.values:
            return
        values, config = {**self.values, **changes}, model.config
        config.max_position_embeddings = values["max_position_embeddings"]
        for key, layers in self.bases.items():
            config.rope_parameters[layers]["rope_theta"] = values[key]
        rotary = model.base_model.rotary_emb
        fresh = type(rotary)(config)  # by the arithmetic of Transformers, whatever the kind of frequencies
        for name, frequencies in fresh.named_buffers():
            rotary.get_buffer(name).copy_(frequencies)
        for name in ("max_seq_len_cached", "original_max_seq_len"):
            setattr(rotary, name, getattr(fresh, name))
        for layers in rotary.rope_type:
            name = f"{layers}_attention_scaling"
            setattr(rotary, name, getattr(fresh, name))
