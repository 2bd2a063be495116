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

from dstrain.recipe.data import SINGLE_SOURCE, MaskingRamp, Source, masking_rates
from dstrain.recipe.phases import Phase
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.recipe.training import Schedule

if TYPE_CHECKING:
    from dstrain.data.mixture import Mixture

Rope = Mapping[str, float | int]


@dataclass(frozen=True)
class PhasePlan:
    """A part of a run in which nothing changes but the masking rate and the learning rate.

    Attributes:
        number: from 0, as it comes in the run.
        name: the recipe's, or `phase 1` and so on.
        first_step: global step that it begins with, from 0.
        steps: how many it has.
        first_row: rows of all steps before it.
        first_token: tokens of them.
        global_batch_rows: rows of a step.
        micro_batch_rows: the most rows of a micro-batch.
        sequence_length: tokens of a row of text.
        row_tokens: tokens of a row; more than `sequence_length` for tasks whose rows are several texts.
        masking_rate: of its first and of its last step; in between it goes in a straight line. (0, 0) without masking.
        weights: of the sources, in their order; they add up to 1.
        schedule: its own, or None where the recipe's goes on.
        schedule_first_step: where the schedule that holds is counted from.
        schedule_steps: how many steps it is counted over.
        learning_rate: the highest.
        rope: keys of the model's config which are not as the recipe's `model.config` says, by now.
    """

    number: int
    name: str
    first_step: int
    steps: int
    first_row: int
    first_token: int
    global_batch_rows: int
    micro_batch_rows: int
    sequence_length: int
    row_tokens: int
    masking_rate: tuple[float, float]
    weights: tuple[float, ...]
    schedule: Schedule | None
    schedule_first_step: int
    schedule_steps: int
    learning_rate: float
    rope: Rope

    @property
    def end_step(self) -> int:
        """The step after its last one."""
        return self.first_step + self.steps

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch_rows * self.row_tokens

    def masking_rate_at(self, step: int) -> float:
        """The masking rate of a global step; that of the last one beyond the end."""
        first, last = self.masking_rate
        if first == last or self.steps == 1:
            return first
        return first + (last - first) * min(step - self.first_step, self.steps - 1) / (self.steps - 1)


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
    sources = recipe.data.training_sources if isinstance(recipe, MaskedLmRecipe) else {SINGLE_SOURCE: Source(shards="")}
    sizes = _sizes(sources, corpus_tokens)
    lanes = recipe.lanes if isinstance(recipe, MaskedLmRecipe) else recipe.train.global_batch_rows
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
    epochs = _notes_of_epochs(timeline, sources, recipe.tokenizer) if isinstance(recipe, MaskedLmRecipe) else ()
    return replace(timeline, notes=(*notes, *epochs))


def in_phase(recipe: Recipe, phase: PhasePlan) -> Recipe:
    """The recipe as if a phase were the whole run: with its batch, row length and masking rates."""
    train = recipe.train.model_copy(
        update={"global_batch_rows": phase.global_batch_rows, "micro_batch_rows": phase.micro_batch_rows}
    )
    if not isinstance(recipe, MaskedLmRecipe):
        return recipe.model_copy(update={"train": train})
    first, last = phase.masking_rate
    rate = first if first == last else MaskingRamp.model_validate({"from": first, "to": last})
    masking = recipe.data.masking.model_copy(update={"rate": rate})
    data = recipe.data.model_copy(update={"sequence_length": phase.sequence_length, "masking": masking})
    return recipe.model_copy(update={"train": train, "data": data})


def _sizes(sources: Mapping[str, Source], corpus_tokens: Mapping[str, int] | int | None) -> tuple[int | None, ...]:
    if isinstance(corpus_tokens, Mapping):
        return tuple(corpus_tokens.get(name) for name in sources)
    return (corpus_tokens if len(sources) == 1 else None,) * len(sources)


# ---------------------------------------------------------------- the recipe's phases


def _phases(recipe: Recipe, sources: Mapping[str, Source], sizes: Sequence[int | None]) -> list[PhasePlan] | None:
    """The recipe's phases as it has them, whatever their sources have; None where an epoch's size is not known."""
    if not isinstance(recipe, MaskedLmRecipe):
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
    recipe: MaskedLmRecipe, phase: Phase, number: int, weights: tuple[float, ...], rope: Rope, last: PhasePlan | None
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
    """Shorten the run, or split phases, where a source that is not to be repeated is exhausted; and say so."""
    names, phases, notes = tuple(sources), list[PhasePlan](), list[str]()
    read = [[0] * lanes for _ in names]  # tokens of each source that each lane has read
    ending = {
        number: source.when_exhausted
        for number, source in enumerate(sources.values())
        if source.when_exhausted != "repeat" and sizes[number] is not None
    }
    dropped: set[int] = set()
    intended = planned[-1].end_step
    for whole in planned:
        rest = whole
        while True:
            weights = [0.0 if number in dropped else weight for number, weight in enumerate(rest.weights)]
            if not any(weights):
                step = rest.first_step
                notes.append(
                    f"no source is left at step {step:,}, and the run ends there, {intended - step:,} steps early"
                )
                return _renumbered(phases), notes
            rest = replace(rest, weights=_shares(weights))
            ends = {
                number: _steps_until_exhausted(rest, number, sizes[number], read[number], lanes)
                for number in ending
                if number not in dropped and rest.weights[number] > 0
            }
            source = min(ends, key=lambda number: ends[number], default=None)
            if source is None or ends[source] >= rest.steps:
                break
            first, second = _split(rest, ends[source])
            step = second.first_step
            if ending[source] == "stop":
                early = f"{intended - step:,} steps early"
                notes.append(f"{names[source]} is exhausted at step {step:,}, and the run ends there, {early}")
                return _renumbered([*phases, first] if first.steps else phases), notes
            notes.append(f"{names[source]} is exhausted at step {step:,} and dropped; the other sources share its rows")
            dropped.add(source)
            if first.steps:
                phases.append(first)
                _add_tokens(read, first, lanes)
            rest = second
        phases.append(rest)
        _add_tokens(read, rest, lanes)
    return _renumbered(phases), notes


def _steps_until_exhausted(phase: PhasePlan, source: int, size: int | None, read: Sequence[int], lanes: int) -> int:
    """How many steps of a phase take no more of a source than its first epoch has in any lane; at most all of them."""
    assert size is not None
    left = [_lane_tokens(size, lanes, lane) - tokens for lane, tokens in enumerate(read)]
    low, high = 0, phase.steps + 1  # low steps are possible, high ones are not or are too many
    while high - low > 1:
        steps = (low + high) // 2
        rows = _lane_rows(phase, lanes, source, steps)
        if all(row * phase.row_tokens <= room for row, room in zip(rows, left, strict=True)):
            low = steps
        else:
            high = steps
    return low


def _lane_tokens(size: int, lanes: int, lane: int) -> int:
    """Tokens of a lane in the first epoch, see `dstrain/data/line.py`."""
    return (size + lane) // lanes


def _add_tokens(read: list[list[int]], phase: PhasePlan, lanes: int) -> None:
    for source, of_lanes in enumerate(read):
        if phase.weights[source] > 0:
            for lane, rows in enumerate(_lane_rows(phase, lanes, source, phase.steps)):
                of_lanes[lane] += rows * phase.row_tokens


def _split(phase: PhasePlan, steps: int) -> tuple[PhasePlan, PhasePlan]:
    """Cut a phase behind so many of its steps, of which the first part may have none."""
    middle = phase.first_step + steps
    first = replace(
        phase,
        steps=steps,
        masking_rate=(phase.masking_rate[0], phase.masking_rate_at(max(phase.first_step, middle - 1))),
    )
    second = replace(
        phase,
        first_step=middle,
        steps=phase.steps - steps,
        first_row=phase.first_row + steps * phase.global_batch_rows,
        first_token=phase.first_token + steps * phase.step_tokens,
        masking_rate=(phase.masking_rate_at(middle), phase.masking_rate[1]),
    )
    return first, second


def _renumbered(phases: Sequence[PhasePlan]) -> tuple[PhasePlan, ...]:
    return tuple(replace(phase, number=number) for number, phase in enumerate(phases))


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
    return sum(_lane_rows(phase, lanes, source, steps))


def _lane_rows(phase: PhasePlan, lanes: int, source: int, steps: int) -> list[int]:
    """Rows of a source that each lane has in the first steps of a phase."""
    rows, weight = steps * (phase.global_batch_rows // lanes), phase.weights[source]
    if weight in (0.0, 1.0):
        return [int(weight) * rows] * lanes
    import numpy as np  # only mixtures need it, and a plan is made in an instant

    found = _mixture(phase.weights, lanes).rows_before(source, np.arange(lanes), np.full(lanes, rows))
    return [int(count) for count in found]


@lru_cache(maxsize=64)
def _mixture(weights: tuple[float, ...], lanes: int) -> "Mixture":
    from dstrain.data.mixture import Mixture

    return Mixture(weights, lanes)


def _notes_of_epochs(timeline: Timeline, sources: Mapping[str, Source], tokenizer: str) -> Iterator[str]:
    """Say of each source how often it is read, or how its tokens are counted where nobody did so."""
    for number, (name, source) in enumerate(sources.items()):
        epochs = timeline.epochs(number, timeline.total_steps)
        if epochs is not None:
            yield f"{name}: {epochs:.1f} epochs" if epochs >= 0.1 else f"{name}: {epochs:.2g} epochs"
            continue
        ends = ", and at which step it ends," if source.when_exhausted != "repeat" else ""
        command = _index_command(source.shards, tokenizer)
        yield f"{name}: how many epochs{ends} is not known until its tokens are counted: `{command}`"


def _index_command(shards: str, tokenizer: str) -> str:
    folder = Path(shards) if not set(shards) & set("*?[{") and not shards.endswith(".tar") else Path(shards).parent
    return shlex.join(["dstrain", "shards", "index", str(folder), "--tokenizer", tokenizer])
