"""How a global batch is split over ranks."""

from dataclasses import dataclass

from dstrain.errors import RecipeError
from dstrain.plan.timeline import PhasePlan
from dstrain.recipe.pair_slots import pair_slots
from dstrain.recipe.schema import PretrainingRecipe, Recipe


@dataclass(frozen=True)
class BatchPlan:
    """A global batch over `world` ranks, some of which may have more rows than others.

    Every rank takes the same number of micro-batches of the same size, so that collectives match; what a rank has fewer
    of is made up by rows of weight 0.

    Attributes:
        world: number of ranks.
        global_batch_rows: rows of a step.
        fewest_rows: of a rank.
        most_rows: of a rank.
        micro_batch_rows: rows of each micro-batch as it is run, those of weight 0 included.
        accumulation: micro-batches of a rank in a step.
        tokens: of a step.
    """

    world: int
    global_batch_rows: int
    fewest_rows: int
    most_rows: int
    micro_batch_rows: int
    accumulation: int
    tokens: int

    @property
    def used(self) -> float:
        """The share of the rows that are run which is of the batch: how much of the machine is used."""
        return self.global_batch_rows / (self.world * self.accumulation * self.micro_batch_rows)

    def __str__(self) -> str:
        ranks = f"{self.world} rank{'s' if self.world != 1 else ''}"
        if self.used == 1:
            split = f"{ranks} × {self.micro_batch_rows} rows × {self.accumulation} accumulation"
            return f"{split} = {self.global_batch_rows:,} rows = {self.tokens:,} tokens"
        rows = (
            f"{self.most_rows:,}" if self.fewest_rows == self.most_rows else _either(self.fewest_rows, self.most_rows)
        )
        return f"{ranks}: {rows} of {self.global_batch_rows:,} rows each, {100 * self.used:.0f} % used"


def _either(fewest: int, most: int) -> str:
    return f"{fewest:,} or {most:,}"


def most_ranks(recipe: Recipe) -> int:
    """Return the greatest number of ranks that can train a recipe; every smaller one can too."""
    return recipe.lanes if isinstance(recipe, PretrainingRecipe) else recipe.train.global_batch_rows


def batch_plan(recipe: Recipe, world: int, phase: PhasePlan | None = None) -> BatchPlan:
    """Split a global batch over `world` ranks.

    Args:
        recipe: what to train.
        world: number of ranks.
        phase: whose batch; None takes what the recipe says outside its phases.

    Raises:
        RecipeError: there are more ranks than can have a row of each batch.
    """
    most = most_ranks(recipe)
    if not 1 <= world <= most:
        raise RecipeError(f"{world} ranks cannot train {recipe.name}: {_limit(recipe, most)}")
    rows = recipe.train.global_batch_rows if phase is None else phase.global_batch_rows
    micro = recipe.train.micro_batch_rows if phase is None else phase.micro_batch_rows
    tokens = rows * (recipe.data.row_tokens if phase is None else phase.row_tokens)
    lane_rows = rows // most  # rows of a lane, which are all of one rank
    fewest, most_rows = most // world * lane_rows, -(-most // world) * lane_rows
    accumulation = -(-most_rows // micro)
    return BatchPlan(world, rows, fewest, most_rows, -(-most_rows // accumulation), accumulation, tokens)


def _limit(recipe: Recipe, most: int) -> str:
    if not isinstance(recipe, PretrainingRecipe):
        return f"train.global_batch_rows={most} gives a row to as many; use 1 to {most} ranks"
    if recipe.data.lanes is not None:
        return f"data.lanes={most} is the most; use 1 to {most} ranks, or more lanes"
    common = recipe.common_rows
    more = f"data.lanes={common}" if common > most else "batches with a greater common divisor"
    return f"data.lanes: null is {most} lanes for its batches; use 1 to {most} ranks, or {more}"


def masked_per_row(rate: float, sequence_length: int) -> int:
    """Return the fixed number of predicted tokens in each row of a step with this masking rate."""
    return max(1, round(rate * sequence_length))


def pairs_per_row(recipe: PretrainingRecipe, sequence_length: int) -> int:
    """Return the fixed number of places for pairs in each row; 0 where the recipe has no pairs."""
    return 0 if recipe.data.pairs.objective == "none" else pair_slots(sequence_length)
