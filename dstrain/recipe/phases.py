"""The `phases` of a pretraining run: parts of it, one after another, each with what is different in it."""

from typing import Annotated

from pydantic import Field

from dstrain.base.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from dstrain.recipe.data import MaskingRamp, MaskingRate, SourceName
from dstrain.recipe.training import PhaseSchedule


class PhaseMasking(Section):
    """The masking rate of a phase."""

    rate: MaskingRate | MaskingRamp | None = None


class PhaseData(Section):
    """The rows of a phase. `sources` gives weights by name; a source that it leaves out has none in this phase."""

    sequence_length: PositiveInt | None = None
    masking: PhaseMasking = PhaseMasking()
    sources: dict[SourceName, NonNegativeFloat] | None = None


class PhaseTrain(Section):
    """The batch of a phase."""

    global_batch_rows: PositiveInt | None = None
    micro_batch_rows: PositiveInt | None = None


class PhaseOptimizer(Section):
    """The highest learning rate of a phase."""

    learning_rate: PositiveFloat | None = None


class PhaseModel(Section):
    """What a ModernBERT's config is changed to when the phase begins. Its weights stay."""

    global_rope_theta: PositiveFloat | None = None
    local_rope_theta: PositiveFloat | None = None
    max_position_embeddings: PositiveInt | None = None


class Phase(Section):
    """A part of the run, of so many `steps` or `tokens`. What it leaves out is as in the rest of the recipe.

    A `schedule` is counted from the phase's first step to its last. Without one the recipe's own goes on, which is
    counted over the whole run. What the `model` section sets holds for the phases after it too.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    data: PhaseData = PhaseData()
    train: PhaseTrain = PhaseTrain()
    optimizer: PhaseOptimizer = PhaseOptimizer()
    schedule: PhaseSchedule | None = None
    model: PhaseModel = PhaseModel()
