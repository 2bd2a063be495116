"""Which global batch each step of a run was made of, and what became of every batch: the ledger, read by data steps.

A step is made of the next global batch. Batches run ahead of steps where some were passed over (`data.skip_rows`), or
dropped by a rollback.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dstrain.checkpoint.identity import GlobalBatches
from dstrain.data.ledger import LEDGER_NAME, read_all_backwards
from dstrain.recipe.data import row_range
from dstrain.recipe.schema import Recipe

Fate = Literal["trained", "skipped", "rolled back", "to come"]


@dataclass(frozen=True)
class Batch:
    """What became of a global batch. `step` is the step that it made or would have made, from 1."""

    step: int
    fate: Fate


class RunBatches:
    """The global batches of a run, or of a recipe that nobody has run.

    Args:
        run_dir: the run's folder; None for a recipe.
        rows: of each batch.
        recipe: what it says of rows to skip.
        last_step: the last one of the run, by its recipe.
    """

    def __init__(self, run_dir: Path | None, rows: GlobalBatches, recipe: Recipe, last_step: int) -> None:
        self._ledger = None if run_dir is None else run_dir / LEDGER_NAME
        self.rows, self.last_step = rows, last_step
        self._skipped = _merged((rows.step_of(first), rows.step_of(last) + 1) for first, last in _ranges(recipe))
        self.steps_done, self.data_steps_done = 0, rows.origin[0]
        newest = next(read_all_backwards(self._ledger), None) if self._ledger and self._ledger.is_file() else None
        if newest is not None:
            entry, counts = newest
            self.steps_done = entry.step if counts else entry.step - 1
            self.data_steps_done = rows.step_of(entry.rows[1]) + 1

    def fates(self, data_steps: Collection[int]) -> dict[int, Batch]:
        """What became of some data steps, and of the rest when it is to come; the run may end before.

        Raises:
            CorpusError: a line of the ledger is damaged.
        """
        wanted = {step for step in data_steps if step < self.data_steps_done}
        found = self._consumed(wanted) if wanted else {}
        return found | self._to_come(set(data_steps) - wanted)

    def data_steps_of(self, first: int, last: int) -> dict[int, int]:
        """The data steps that steps `first` … `last` were or will be made of.

        Raises:
            CorpusError: a line of the ledger is damaged.
        """
        found: dict[int, int] = {}
        if self._ledger is not None and first <= self.steps_done:
            for entry, counts in read_all_backwards(self._ledger):
                if counts and entry.step < first:
                    break
                if counts and entry.step <= last and entry.rows[0] >= self.rows.origin[1]:
                    found[entry.step] = self.rows.step_of(entry.rows[0])
        for step in range(max(first, self.steps_done + 1), last + 1):
            found[step] = self._after(step - self.steps_done) - 1
        return dict(sorted(found.items()))

    def last_data_step(self) -> int:
        """The data step that the run's last step is or will be made of."""
        return self._after(max(0, self.last_step - self.steps_done)) - 1

    def _consumed(self, wanted: set[int]) -> dict[int, Batch]:
        assert self._ledger is not None, "nothing is consumed without a ledger"
        found: dict[int, Batch] = {}
        lowest = min(wanted)
        for entry, counts in read_all_backwards(self._ledger):
            if entry.rows[0] < self.rows.origin[1]:
                continue  # of other data
            data_step = self.rows.step_of(entry.rows[0])
            if counts and data_step < lowest:
                break
            if data_step in wanted:
                fate: Fate = "trained" if counts else "skipped" if entry.skipped else "rolled back"
                if fate == "trained" or data_step not in found:
                    found[data_step] = Batch(entry.step, fate)
        return found

    def _to_come(self, wanted: set[int]) -> dict[int, Batch]:
        found: dict[int, Batch] = {}
        for data_step in wanted:
            skipped = sum(
                max(0, min(last, data_step) - max(first, self.data_steps_done)) for first, last in self._skipped
            )
            step = self.steps_done + data_step - self.data_steps_done - skipped + 1
            is_skipped = any(first <= data_step < last for first, last in self._skipped)
            found[data_step] = Batch(step, "skipped" if is_skipped else "to come")
        return found

    def _after(self, steps: int) -> int:
        """The data step that follows so many steps to come."""
        data_step = self.data_steps_done
        for first, last in self._skipped:
            if last <= data_step:
                continue
            before = max(0, first - data_step)
            if steps <= before:
                break
            steps, data_step = steps - before, last
        return data_step + steps


def _ranges(recipe: Recipe) -> list[tuple[int, int]]:
    """Rows to skip: first and last of each range."""
    return [row_range(text) for text in recipe.data.skip_rows]


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
