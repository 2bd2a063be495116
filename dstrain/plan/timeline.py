"""The course of a run: its phases one after another, with steps, rows and tokens counted from the run's beginning.

    recipe's phases ─ steps of each ─ what sources end in it ─► PhasePlan, PhasePlan, … ─► Timeline

All of it is a pure function of the recipe and of how many tokens its corpora have. A recipe without phases has one. A
phase in which a source is exhausted and dropped becomes two, the second without that source.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.plan.phase_plan import PhasePlan, Rope, in_phase
from dstrain.recipe.data import SINGLE_SOURCE, MaskedLmData, Source, masking_rates
from dstrain.recipe.phases import Phase
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.training import Schedule

if TYPE_CHECKING:
    from dstrain.data.mixture import Mixture

__all__ = ["PhasePlan", "Timeline", "in_phase", "make_timeline"]


@dataclass(frozen=True)
class Timeline:
    """All phases of a run; `notes` are what people should know beforehand, a sentence each."""

    phases: tuple[PhasePlan, ...]
    total_steps: int
    lanes: int
    source_names: tuple[str, ...]
    source_tokens: tuple[int | None, ...]
    notes: tuple[str, ...]

    def phase_at(self, step: int) -> PhasePlan:
        """The phase of a global step, from 0; the last one beyond the end."""
        return next((phase for phase in self.phases if step < phase.end_step), self.phases[-1])

    def rows_before(self, step: int) -> int:
        """Rows of all steps before one: the number of its first row."""
        phase = self.phase_at(step)
        return phase.first_row + (step - phase.first_step) * phase.global_batch_rows

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before one."""
        phase = self.phase_at(step)
        return phase.first_token + (step - phase.first_step) * phase.step_tokens

    def source_tokens_before(self, source: int, step: int) -> int:
        """Tokens of a source, by its number, in all steps before one."""
        return sum(
            _rows_of_source(phase, self.lanes, source, steps) * phase.row_tokens for phase, steps in self._begun(step)
        )

    def epochs(self, source: int, step: int) -> float | None:
        """How often a source, by its number, was read in all steps before one; None where its size is not known."""
        size = self.source_tokens[source]
        return None if size is None else self.source_tokens_before(source, step) / size

    def _begun(self, step: int) -> Iterator[tuple[PhasePlan, int]]:
        """Each phase that begins before a step, with how many of its steps come before it."""
        for phase in self.phases:
            beyond = phase is self.phases[-1]
            steps = step - phase.first_step if beyond else min(step, phase.end_step) - phase.first_step
            if steps > 0:
                yield phase, steps


def make_timeline(recipe: Recipe, corpus_tokens: Mapping[str, int] | int | None) -> Timeline | None:
    """Lay out a run; None where its length is in epochs of a corpus of unknown size.

    Args:
        recipe: what to train.
        corpus_tokens: tokens of one epoch where they are known, by source if there are several. For labelled examples,
            each of which fills one row: examples × row length.
    """
    sources = (
        recipe.data.training_sources if isinstance(recipe, PretrainingRecipe) else {SINGLE_SOURCE: Source(shards="")}
    )
    sizes = _sizes(sources, corpus_tokens)
    lanes = recipe.lanes if isinstance(recipe, PretrainingRecipe) else recipe.train.global_batch_rows
    planned = _phases(recipe, sources, sizes)
    if planned is None:
        return None
    phases, notes = _with_ends_of_sources(planned, sources, sizes, lanes)
    total = phases[-1].end_step
    phases = tuple(
        replace(phase, schedule_steps=_schedule_end(phase, phases) - phase.schedule_first_step)
        if phase.schedule is not None
        else replace(phase, schedule_first_step=0, schedule_steps=total)
        for phase in phases
    )
    timeline = Timeline(phases, total, lanes, tuple(sources), sizes, ())
    epochs = _notes_of_epochs(timeline, recipe) if isinstance(recipe, PretrainingRecipe) else ()
    return replace(timeline, notes=(*notes, *epochs))


def _sizes(sources: Mapping[str, Source], corpus_tokens: Mapping[str, int] | int | None) -> tuple[int | None, ...]:
    if isinstance(corpus_tokens, Mapping):
        return tuple(corpus_tokens.get(name) for name in sources)
    return (corpus_tokens if len(sources) == 1 else None,) * len(sources)


# ---------------------------------------------------------------- the recipe's phases


def _phases(recipe: Recipe, sources: Mapping[str, Source], sizes: Sequence[int | None]) -> list[PhasePlan] | None:
    """The recipe's phases as it has them, whatever their sources have; None where an epoch's size is not known."""
    if not isinstance(recipe, PretrainingRecipe):
        whole = _whole_run(recipe, (1.0,), (0.0, 0.0), sizes[0])
        return None if whole is None else [whole]
    data = recipe.data
    weights = _shares([source.weight for source in sources.values()])
    if not recipe.phases:
        whole = _whole_run(recipe, weights, data.masking.rates, sizes[0])
        return None if whole is None else [whole]
    phases: list[PhasePlan] = []
    rope: dict[str, float | int] = {}
    for number, phase in enumerate(recipe.phases):
        rope = rope | phase.model.model_dump(exclude_none=True)
        phases.append(_phase_plan(recipe, phase, number, weights, rope, phases[-1] if phases else None))
    return phases


def _phase_plan(
    recipe: PretrainingRecipe, phase: Phase, number: int, weights: tuple[float, ...], rope: Rope, last: PhasePlan | None
) -> PhasePlan:
    rows = phase.train.global_batch_rows or recipe.train.global_batch_rows
    length = phase.data.sequence_length or recipe.data.sequence_length
    given = phase.data.sources
    if phase.steps is not None:
        steps = phase.steps
    else:
        assert phase.tokens is not None, "a valid phase has a length"
        steps = math.ceil(phase.tokens / (rows * length))
    first_step = 0 if last is None else last.end_step
    return PhasePlan(
        number=number,
        name=phase.name or f"phase {number + 1}",
        first_step=first_step,
        steps=steps,
        first_row=0 if last is None else last.first_row + last.steps * last.global_batch_rows,
        first_token=0 if last is None else last.first_token + last.steps * last.step_tokens,
        global_batch_rows=rows,
        micro_batch_rows=phase.train.micro_batch_rows or recipe.train.micro_batch_rows,
        sequence_length=length,
        row_tokens=length,
        masking_rate=recipe.data.masking.rates if (rate := phase.data.masking.rate) is None else masking_rates(rate),
        weights=weights if given is None else _shares([given.get(name, 0.0) for name in recipe.data.training_sources]),
        schedule=None if phase.schedule is None else Schedule(**phase.schedule.model_dump()),
        schedule_first_step=0 if phase.schedule is None else first_step,
        schedule_steps=steps,
        learning_rate=phase.optimizer.learning_rate or recipe.optimizer.learning_rate,
        rope=rope,
    )


def _whole_run(
    recipe: Recipe, weights: tuple[float, ...], masking_rate: tuple[float, float], epoch_tokens: int | None
) -> PhasePlan | None:
    """The one phase of a recipe without phases."""
    train, step_tokens = recipe.train, recipe.train.global_batch_rows * recipe.data.row_tokens
    if train.steps is not None:
        steps = train.steps
    elif train.tokens is not None:
        steps = math.ceil(train.tokens / step_tokens)
    elif epoch_tokens is None:
        return None
    else:
        assert train.epochs is not None, "a valid recipe has a length"
        steps = max(1, math.ceil(round(train.epochs * epoch_tokens / step_tokens, 6)))
    return PhasePlan(
        number=0,
        name="phase 1",
        first_step=0,
        steps=steps,
        first_row=0,
        first_token=0,
        global_batch_rows=train.global_batch_rows,
        micro_batch_rows=train.micro_batch_rows,
        sequence_length=recipe.data.sequence_length,
        row_tokens=recipe.data.row_tokens,
        masking_rate=masking_rate,
        weights=weights,
        schedule=None,
        schedule_first_step=0,
        schedule_steps=steps,
        learning_rate=recipe.optimizer.learning_rate,
        rope={},
    )


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)


# ---------------------------------------------------------------- sources that end


def _with_ends_of_sources(
    planned: Sequence[PhasePlan], sources: Mapping[str, Source], sizes: Sequence[int | None], lanes: int
) -> tuple[tuple[PhasePlan, ...], list[str]]:
    """What is left of the phases where sources that are not repeated end, and sentences about that."""
    if all(source.when_exhausted == "repeat" for source in sources.values()):
        return tuple(planned), []
    from dstrain.plan.exhaustion import with_ends_of_sources  # imports numpy

    return with_ends_of_sources(planned, sources, sizes, lanes)


def _schedule_end(phase: PhasePlan, phases: Sequence[PhasePlan]) -> int:
    """The last step's successor of all parts of a phase that has its own schedule."""
    return max(
        part.end_step
        for part in phases
        if part.schedule is not None and part.schedule_first_step == phase.schedule_first_step
    )


# ---------------------------------------------------------------- rows of sources


def _rows_of_source(phase: PhasePlan, lanes: int, source: int, steps: int) -> int:
    """Rows of a source in the first steps of a phase."""
    weight = phase.weights[source]
    if weight in (0.0, 1.0):
        return int(weight) * steps * phase.global_batch_rows
    import numpy as np  # only mixtures need it, and a plan is made in an instant

    rows = np.array(steps * (phase.global_batch_rows // lanes))
    return int(_mixture(phase.weights, lanes).rows_before(source, np.arange(lanes), rows).sum())


@lru_cache(maxsize=64)
def _mixture(weights: tuple[float, ...], lanes: int) -> "Mixture":
    from dstrain.data.mixture import Mixture

    return Mixture(weights, lanes)


def _notes_of_epochs(timeline: Timeline, recipe: PretrainingRecipe) -> Iterator[str]:
    """Say of each source how often it is read, or how its tokens are counted where nobody did so."""
    for number, (name, source) in enumerate(recipe.data.training_sources.items()):
        epochs = timeline.epochs(number, timeline.total_steps)
        if epochs is not None:
            yield f"{name}: {epochs:.1f} epochs" if epochs >= 0.1 else f"{name}: {epochs:.2g} epochs"
            continue
        ends = ", and at which step it ends," if source.when_exhausted != "repeat" else ""
        command = _index_command(source.shards, recipe)
        yield f"{name}: how many epochs{ends} is not known until its tokens are counted: `{command}`"


def _index_command(shards: str, recipe: PretrainingRecipe) -> str:
    folder = Path(shards) if not set(shards) & set("*?[{") and not shards.endswith(".tar") else Path(shards).parent
    field = (
        []
        if recipe.data.text_field == MaskedLmData.model_fields["text_field"].default
        else ["--field", recipe.data.text_field]
    )
    return shlex.join(["dstrain", "shards", "index", str(folder), "--tokenizer", recipe.tokenizer, *field])
