"""What the `model` section has whatever the architecture: a config or a pretrained folder; what is trained, and how."""

from typing import Annotated, Literal

from pydantic import Field

from dstrain.base.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2022), through peft: the encoder is frozen, its adapters and the head are trained.

    The output of a linear layer with an adapter gains `alpha` ÷ `rank` × what the adapter makes of its input.
    `target_modules` are names of linear layers, or ends of names, as in [query, value]; [] takes queries and values.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()


class Unfreezing(Section):
    """Gradual unfreezing (Howard & Ruder 2018): at first the head is trained, then layer after layer from the top.

    Another layer joins after each `every_steps` updates, or `every_epochs`; the embeddings are the last.
    """

    every_steps: PositiveInt | None = None
    every_epochs: PositiveFloat | None = None


class ModelKeys(Section):
    """Keys of every architecture; its own section narrows `architecture` and `config`.

    Exactly one of `config` (from scratch) and `pretrained` (a folder) is given. `frozen_layers` keeps the embeddings
    and as many of the first layers as they are; 0 trains everything. `dropout` takes the place of every dropout that
    the config of `pretrained` has. `attention` auto is the architecture's first, sdpa for most, and
    matmul on CPUs in bf16, where sdpa is slow, with rows of up to 1,024 tokens, if the architecture offers it.
    """

    architecture: str
    config: Section | None = None
    pretrained: str | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    frozen_layers: NonNegativeInt = 0
    unfreezing: Unfreezing | None = None
    lora: Lora | None = None
    activation_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "matmul", "eager"] = "auto"
