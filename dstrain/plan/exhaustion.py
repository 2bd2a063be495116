"""Where sources that are not repeated end: the run does, or the phase becomes one without them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dstrain.data.mixture import Mixture
from dstrain.errors import RecipeError
from dstrain.plan.phase_plan import PhasePlan
from dstrain.recipe.data import Source


def with_ends_of_sources(
    planned: Sequence[PhasePlan], sources: Mapping[str, Source], sizes: Sequence[int | None], lanes: int
) -> tuple[tuple[PhasePlan, ...], list[str]]:
    """Shorten the run, or split phases, where a source is exhausted; and say so.

    A source is exhausted at the first step that would read some of it a second time.

    Args:
        planned: the recipe's phases.
        sources: by name.
        sizes: tokens of one epoch of each source; of one whose size is not known nobody can say where it ends.
        lanes: of the run.

    Returns:
        The phases, and a sentence for each source that ends.

    Raises:
        RecipeError: nothing is left of the run.
    """
    course = _Course(tuple(sources), lanes, planned[-1].end_step)
    ending = {
        number: size
        for number, (source, size) in enumerate(zip(sources.values(), sizes, strict=True))
        if source.when_exhausted != "repeat" and size is not None
    }
    actions = [source.when_exhausted for source in sources.values()]
    for phase in planned:
        rest: PhasePlan | None = phase
        while rest is not None:
            rest = course.without_dropped(rest)
            if rest is None:
                return course.ended(phase.name)
            ends = {number: course.steps_until_exhausted(rest, number, size) for number, size in ending.items()}
            source = min(ends, key=lambda number: ends[number], default=None)
            if source is None or ends[source] >= rest.steps:
                course.phases.append(rest)
                break
            others = [weight for number, weight in enumerate(rest.weights) if number not in (source, *course.dropped)]
            rest = course.end_source(rest, source, ends[source], ends_run=actions[source] == "stop" or not any(others))
            if rest is None:
                return course.ended(phase.name)
    return course.ended("")


@dataclass
class _Course:
    """The phases so far, without the sources that were dropped."""

    names: tuple[str, ...]
    lanes: int
    intended_steps: int
    phases: list[PhasePlan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)

    def without_dropped(self, phase: PhasePlan) -> PhasePlan | None:
        """The phase with its rows shared by the sources that are left; None where there are none."""
        if not any(phase.weights[number] for number in self.dropped):
            return phase
        weights = [0.0 if number in self.dropped else weight for number, weight in enumerate(phase.weights)]
        total = sum(weights)
        if not total:
            step = phase.first_step
            self.notes.append(f"no source is left at step {step:,}, and the run ends there, {self._early(step)}")
            return None
        return replace(phase, weights=tuple(weight / total for weight in weights))

    def steps_until_exhausted(self, phase: PhasePlan, source: int, size: int) -> int:
        """How many steps of a phase read nothing of a source a second time; all of them and one, if all do not."""
        if not phase.weights[source]:
            return phase.steps + 1
        epoch = (size + np.arange(self.lanes)) // self.lanes  # tokens of each lane in the first one, see `line.py`
        before = sum((self._lane_tokens(earlier, source, earlier.steps) for earlier in self.phases), start=0 * epoch)
        low, high = 0, phase.steps + 1  # low steps read nothing twice, high ones do or are too many
        while high - low > 1:
            steps = (low + high) // 2
            if (before + self._lane_tokens(phase, source, steps) > epoch).any():
                high = steps
            else:
                low = steps
        return low

    def _lane_tokens(self, phase: PhasePlan, source: int, steps: int) -> NDArray[np.int64]:
        """What each lane reads of a source in the first steps of a phase."""
        rows = np.array(steps * (phase.global_batch_rows // self.lanes))
        mixture = Mixture(phase.weights, self.lanes)
        return mixture.rows_before(source, np.arange(self.lanes), rows) * phase.row_tokens

    def end_source(self, phase: PhasePlan, source: int, steps: int, *, ends_run: bool) -> PhasePlan | None:
        """End a source behind so many steps of a phase, and return the rest of it; None where the run ends."""
        step = phase.first_step + steps
        exhausted = f"{self.names[source]} is exhausted at step {step:,}"
        if ends_run:
            self.notes.append(f"{exhausted}, and the run ends there, {self._early(step)}")
            if steps:
                self.phases.append(replace(phase, steps=steps))
            return None
        self.notes.append(f"{exhausted} and dropped; the other sources share its rows")
        self.dropped.add(source)
        if not steps:
            return phase
        first, rest = phase.split(steps)
        self.phases.append(first)
        return rest

    def ended(self, phase_name: str) -> tuple[tuple[PhasePlan, ...], list[str]]:
        """All phases, numbered as they come."""
        if not self.phases:
            raise RecipeError(
                f"data.sources: a source that is not repeated has not the rows of one step of {phase_name}; use "
                "when_exhausted: repeat, or more text"
            )
        return tuple(replace(phase, number=number) for number, phase in enumerate(self.phases)), self.notes

    def _early(self, step: int) -> str:
        return f"{self.intended_steps - step:,} steps early"
