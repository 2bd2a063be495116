"""MarianMT (Junczys-Dowmunt et al. 2018; Vaswani et al. 2017): BART with sines for positions."""

from typing import Literal

from dstrain.architectures import ModelKeys
from dstrain.architectures.bart import Bart, BartConfig
from dstrain.base.section import PositiveInt


class MarianConfig(BartConfig):
    """The same keys with MarianMT's defaults. Positions are sines, which are not trained."""

    vocab_size: PositiveInt = 58101


class MarianModel(ModelKeys):
    """MarianMT (Junczys-Dowmunt et al. 2018; Vaswani et al. 2017)."""

    architecture: Literal["marian"]
    config: MarianConfig | None = None


class Marian(Bart):
    """See the file."""

    section = MarianModel
    config = MarianConfig
    fixed_positions = True


ARCHITECTURE = Marian()
