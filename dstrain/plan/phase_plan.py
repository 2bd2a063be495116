"""A phase of a run with its numbers, and the recipe as it is in a phase."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstrain.recipe.data import MaskingRamp
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.training import Schedule

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

    def split(self, steps: int) -> tuple["PhasePlan", "PhasePlan"]:
        """Cut it behind so many of its steps, at least one; masking goes on from the first part to the second."""
        assert 0 < steps < self.steps
        middle = self.first_step + steps
        first = replace(self, steps=steps, masking_rate=(self.masking_rate[0], self.masking_rate_at(middle - 1)))
        return first, self.without_first(steps)

    def without_first(self, steps: int) -> "PhasePlan":
        """What is left of it behind so many of its steps."""
        middle = self.first_step + steps
        return replace(
            self,
            first_step=middle,
            steps=self.steps - steps,
            first_row=self.first_row + steps * self.global_batch_rows,
            first_token=self.first_token + steps * self.step_tokens,
            masking_rate=(self.masking_rate_at(middle), self.masking_rate[1]),
        )


def in_phase(recipe: Recipe, phase: PhasePlan) -> Recipe:
    """The recipe as if a phase were the whole run: with its batch, row length and masking rates."""
    train = recipe.train.model_copy(
        update={"global_batch_rows": phase.global_batch_rows, "micro_batch_rows": phase.micro_batch_rows}
    )
    if not isinstance(recipe, PretrainingRecipe):
        return recipe.model_copy(update={"train": train})
    first, last = phase.masking_rate
    rate = first if first == last else MaskingRamp.model_validate({"from": first, "to": last})
    masking = recipe.data.masking.model_copy(update={"rate": rate})
    data = recipe.data.model_copy(update={"sequence_length": phase.sequence_length, "masking": masking})
    return recipe.model_copy(update={"train": train, "data": data})
