"""Everything that `dstrain plan` knows of a recipe on a number of ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.architectures import frozen_parameters, model_shape, parameters_of
from dstrain.plan.batch import BatchPlan, batch_plan
from dstrain.plan.corpus import CorpusSize
from dstrain.plan.engine import deepspeed_config
from dstrain.plan.flops import Flops, step_flops
from dstrain.plan.heads import UNKNOWN_OUTPUTS, head_outputs
from dstrain.plan.memory import Memory, activation_bytes, rank_memory, recipe_checkpoint_bytes
from dstrain.plan.timeline import PhasePlan, Timeline, in_phase, make_timeline
from dstrain.recipe.schema import Recipe

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class PhaseNumbers:
    """What a phase takes. `plan` is None where the run's length is not known; there is one phase then."""

    plan: PhasePlan | None
    batch: BatchPlan
    flops: Flops

    @property
    def steps(self) -> int | None:
        """How many steps it has, where that is known."""
        return None if self.plan is None else self.plan.steps


@dataclass(frozen=True)
class Plan:
    """Everything that `dstrain plan` prints.

    Memory is that of the phase that needs most of it, by ZeRO stage, without and with activation checkpointing.
    """

    recipe: Recipe
    world: int
    timeline: Timeline | None
    phases: list[PhaseNumbers]
    corpora: Mapping[str, CorpusSize]
    parameters: dict[str, int]
    frozen: int
    checkpoint_bytes: int
    memory: dict[bool, list[Memory]]
    memory_phase: PhaseNumbers
    cpu_activations: int
    deepspeed: dict[str, Any]

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, where they are known."""
        return None if self.timeline is None else self.timeline.total_steps

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run, where they are known."""
        return None if self.timeline is None else self.timeline.tokens_before(self.timeline.total_steps)

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(self.parameters.values())

    @property
    def trained_parameters(self) -> int:
        """Those that the optimizer has."""
        return self.total_parameters - self.frozen


def make_plan(
    recipe: Recipe,
    world: int,
    corpora: Mapping[str, CorpusSize] | int | None,
) -> Plan:
    """Work out a plan.

    Args:
        recipe: what to train.
        world: number of ranks.
        corpora: the known sizes of sources, by name; of labelled examples the tokens, as `make_timeline` counts them.

    Raises:
        RecipeError: there are more ranks than can train it, or a pretrained model's config cannot be read.
    """
    shape = model_shape(recipe.model)
    labels = head_outputs(recipe) or UNKNOWN_OUTPUTS
    parameters = parameters_of(recipe.model, shape, recipe.head, labels)
    frozen, total = frozen_parameters(recipe.model, shape), sum(parameters.values())
    sizes = corpora if isinstance(corpora, Mapping) else {}
    tokens = corpora if isinstance(corpora, int) else {name: size.tokens for name, size in sizes.items()}
    timeline = make_timeline(recipe, tokens)
    phases = [
        PhaseNumbers(phase, batch_plan(recipe, world, phase), step_flops(recipe, shape, phase))
        for phase in (timeline.phases if timeline is not None else (None,))
    ]
    checkpointing = recipe.model.activation_checkpointing
    needs_most = max(
        phases, key=lambda phase: activation_bytes(_as_run(recipe, phase), shape, checkpointing=checkpointing)
    )
    as_run = _as_run(recipe, needs_most)
    activations = {switch: activation_bytes(as_run, shape, checkpointing=switch) for switch in (False, True)}
    return Plan(
        recipe=recipe,
        world=world,
        timeline=timeline,
        phases=phases,
        corpora=sizes,
        parameters=parameters,
        frozen=frozen,
        checkpoint_bytes=recipe_checkpoint_bytes(recipe, labels),
        memory={
            switch: [rank_memory(recipe, total, kept, world, stage, frozen) for stage in STAGES]
            for switch, kept in activations.items()
        },
        memory_phase=needs_most,
        cpu_activations=activation_bytes(as_run, shape, checkpointing=checkpointing, on_cpu=True),
        deepspeed=deepspeed_config(recipe, world, phases[0].plan),
    )


def _as_run(recipe: Recipe, phase: PhaseNumbers) -> Recipe:
    """The recipe of a phase, with micro-batches of as many rows as they are run with."""
    recipe = recipe if phase.plan is None else in_phase(recipe, phase.plan)
    train = recipe.train.model_copy(update={"micro_batch_rows": phase.batch.micro_batch_rows})
    return recipe.model_copy(update={"train": train})
