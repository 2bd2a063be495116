"""The streams of rows that a recipe asks for, as plain data for the data process."""

from typing import Any

from dstrain.data.spec import PhaseSpec, SourceSpec, StreamSpec
from dstrain.plan.timeline import Timeline
from dstrain.recipe.schema import PretrainingRecipe


def training_stream(recipe: PretrainingRecipe, timeline: Timeline, origin: tuple[int, int] = (0, 0)) -> StreamSpec:
    """The rows that a run trains on.

    Args:
        recipe: of the run.
        timeline: its phases.
        origin: the data step and the row with which the run went on with the data that it has now.
    """
    first_step = origin[0]
    phases = []
    for number, phase in enumerate(timeline.phases):
        is_last = number == len(timeline.phases) - 1
        if not is_last and phase.first_step + phase.steps <= first_step:
            continue
        begins = max(phase.first_step, first_step)
        rates = phase.masking_rate
        if begins > phase.first_step and phase.steps > 1:  # begun before: its masking goes on from there
            passed = min((begins - phase.first_step) / (phase.steps - 1), 1.0)
            rates = rates[0] + (rates[1] - rates[0]) * passed, rates[1]
        steps = max(phase.first_step + phase.steps - begins, 1)
        phases.append(PhaseSpec(begins, steps, phase.global_batch_rows, phase.sequence_length, rates, phase.weights))
    sources = tuple(SourceSpec(name, source.shards) for name, source in recipe.data.training_sources.items())
    return StreamSpec(
        sources=sources,
        phases=tuple(phases),
        lanes=timeline.lanes,
        purpose="train",
        first_step=first_step,
        first_row=origin[1],
        **_common(recipe),
    )


def validation_stream(recipe: PretrainingRecipe, location: str, lanes: int) -> StreamSpec:
    """The rows of an evaluation on held-out shards: by the recipe's own length and batch in every phase."""
    data = recipe.data
    rate, _ = data.masking.rates
    phase = PhaseSpec(0, None, recipe.train.global_batch_rows, data.sequence_length, (rate, rate), (1.0,))
    return StreamSpec(
        sources=(SourceSpec("valid", location),),
        phases=(phase,),
        lanes=lanes,
        purpose="valid",
        **_common(recipe),
    )


def _common(recipe: PretrainingRecipe) -> dict[str, Any]:
    data = recipe.data
    has_pairs = data.pairs.objective != "none"
    return {
        "seed": data.seed,
        "tokenizer": recipe.tokenizer,
        "shuffle_window": data.shuffle_window,
        "masking_replace": data.masking.replace,
        "masking_unit": data.masking.unit,
        "text_field": data.text_field,
        "on_bad_sample": data.on_bad_sample,
        "max_bad_samples": data.max_bad_samples,
        "pair_objective": data.pairs.objective if has_pairs else None,
        "pair_tokens": data.pairs.tokens,
    }
