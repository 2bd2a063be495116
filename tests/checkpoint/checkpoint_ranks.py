"""What ranks do in the checkpoint tests: train a little, save, load, and hand back all the state that they hold."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dstrain.checkpoint.fragments import resident_fragments
from dstrain.checkpoint.load import Source
from dstrain.checkpoint.manifest import checkpoint_folder
from dstrain.data.rows import digest_hex
from dstrain.plan import engine
from dstrain.plan.schedule import learning_rate
from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import StepBatch, Task
from dstrain.train import saving
from dstrain.train.main import build_task, prepare
from dstrain.train.reporting import Reporter
from dstrain.train.saving import Saving
from dstrain.train.state import TrainState, resume_state

Piece = tuple[str, str, int, NDArray[np.float32]]  # parameter, state, first element, elements
Phase = Callable[[str], None]
_ROWS: dict[int, StepBatch] = {}  # of this rank, by data step


@dataclass
class Job:
    """One rank's part of a run, and where it stands."""

    runtime: Runtime
    task: Task
    state: TrainState = field(default_factory=TrainState)
    source: Source | None = None

    def train(self, steps: int) -> list[tuple[float, str]]:
        """Train `steps` global steps; returns the loss and the digest of the rows of each.

        A rank that has had a step's rows before, under another ZeRO stage, takes them from memory.
        """
        wanted = range(self.state.data_step, self.state.data_step + steps)
        if not all(step in _ROWS for step in wanted):
            self.read_rows(steps)
        return [self._train(_ROWS[step]) for step in wanted]

    def read_rows(self, steps: int) -> None:
        """Read the rows of the next steps."""
        first = self.state.data_step
        assert first == (self.source.manifest.data_step if self.source else 0)
        with self.task.steps(first) as batches:
            _ROWS.update((step, next(batches)) for step in range(first, first + steps))

    def _train(self, batch: StepBatch) -> tuple[float, str]:
        targets, *digest = self.runtime.all_reduce_sum([batch.targets, *batch.digest])
        loss_sum = 0.0
        last = batch.micro_batches[-1]
        for micro_batch in batch.micro_batches:
            loss, _ = micro_batch.run(self.runtime.engine)
            self.runtime.backward(loss, int(targets), is_last=micro_batch is last)
            loss_sum += float(loss.detach())
        rate = learning_rate(self.runtime.recipe, self.task.totals.timeline, self.state.step)
        assert self.runtime.apply_step(rate)
        self.state = self.state.after(batch)
        mean = float(self.runtime.all_reduce_sum_float([loss_sum])[0]) / int(targets)
        return mean, digest_hex(np.array(digest))

    def save(self, run_dir: Path, phase: Phase = lambda _: None) -> Path:
        """Save, wait until it is done, and return the checkpoint. `phase` is called in the thread that saves."""
        with self.saving(run_dir, phase) as saves:
            saves.begin(self.state, {})
            saves.finish()
        return checkpoint_folder(run_dir, self.state.step)

    @contextmanager
    def saving(self, run_dir: Path, phase: Phase = lambda _: None) -> Iterator[Saving]:
        class Phases(Reporter):
            def saving(self, name: str) -> None:
                phase(name)

        runtime = self.runtime
        with Phases(runtime, runtime.recipe, run_dir, 1, self.task.totals.steps) as report:
            yield Saving(runtime, self.task, run_dir, report)

    def resume(self, run_dir: Path) -> "Job":
        self.state, self.source = resume_state(self.runtime, self.task, run_dir)
        return self

    def probe(self) -> float:
        """Loss of two fixed rows, the same in every world: what the weights that a forward pass uses amount to."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(5, 256, (2, 32), generator=generator)
        positions = torch.arange(32).expand(2, 32)
        masked = torch.tensor([[1, 5, 9, 20]] * 2)
        with torch.no_grad():
            loss, _ = self.runtime.engine(rows, positions, masked, rows.gather(1, masked))
        return float(loss)

    def resident(self) -> list[Piece]:
        """Everything that this rank holds of the training state, whoever else holds it too."""
        return [
            (fragment.parameter, state, fragment.offset, view.detach().float().cpu().numpy().copy())
            for fragment in resident_fragments(self.runtime, self.task.model)
            for state, view in fragment.states.items()
        ]


def job(recipe: Recipe, frozen: Collection[str] = ()) -> Job:
    """Set up a rank. May be called again for another recipe, with the same number of ranks.

    Parameters whose names contain one of `frozen` are not trained.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    saving.RETRY_AFTER_SECONDS = 0.1
    engine.PERSISTENT_ELEMENTS = 500  # stage 3: some parameters of the tiny model stay gathered, some do not
    runtime = Runtime.start(recipe)
    task = build_task(recipe, runtime)
    for name, parameter in task.model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    prepare(runtime, task)
    return Job(runtime, task)
