"""The training loop: next batch, forward, backward, step; and four plain calls: log, evaluate, save, stop."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dstrain.base.durable import write_durably
from dstrain.base.phases import RankPhase
from dstrain.checkpoint.load import take
from dstrain.checkpoint.manifest import checkpoints_of, folder_name
from dstrain.data.rows import digest_hex
from dstrain.errors import CheckpointError, RecipeError, UserError
from dstrain.plan.schedule import learning_rate
from dstrain.plan.timeline import PhasePlan
from dstrain.recipe.data import row_range
from dstrain.recipe.difference import Difference
from dstrain.recipe.schema import Recipe
from dstrain.runtime.peak import peak_flops
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import StepBatch, Task, perplexity, seeded_micro_batches
from dstrain.train.best import chosen, gave_up, plateaued
from dstrain.train.reporting import Reporter, peak_memory_mb
from dstrain.train.saving import Saving
from dstrain.train.state import TrainState, restore_state, resume_state

Outcome = Literal["done", "stopped"]
MAX_ROLLBACKS = 5  # of a whole run; then something is wrong that rows do not explain
MAX_SKIPS_IN_A_ROW = 5
TEST_SCORES = "test.json"  # in the run's folder


class NonFiniteError(UserError):
    """The loss or its gradient is NaN or infinite, and `on_nan` gives up. Nothing was applied; exit code 2."""


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 raise a flag; ranks agree on it at the next step boundary, and only then act."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


@dataclass
class SourceSums:
    """What this rank has seen of each source."""

    sums: Tensor  # fp64 (sources, 3): losses, right predictions and targets
    rows: NDArray[np.int64]  # (sources,)


@dataclass
class Interval:
    """What happened since the last logged step."""

    started: float
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds_waited: float = 0.0  # for data
    sources: SourceSums | None = None  # of a mixture, on this rank


class Loop:
    """One rank's training of a task, from where the run stands to its end."""

    def __init__(self, runtime: Runtime, task: Task, run_dir: Path, report: Reporter, stop: StopRequest) -> None:
        self.runtime, self.task, self.run_dir, self.report, self.stop = runtime, task, run_dir, report, stop
        self.recipe: Recipe = runtime.recipe
        self.saving = Saving(runtime, task, run_dir, report)
        self.saved_step: int | None = None  # or about to be
        self.scores: dict[str, float] = {}  # of the newest evaluation, which was at
        self.scores_step: int | None = None
        self.skips_in_a_row = 0
        self.phase: PhasePlan | None = None  # that the newest step was of
        self.skip_rows = [row_range(text) for text in self.recipe.data.skip_rows]
        dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        self.peak_flops = runtime.world_size * peak_flops(runtime.device, dtype)

    def run(self) -> Outcome:
        """Train to the end, or to the step boundary after a stop request; both end with a checkpoint."""
        try:
            return self._run()
        except UserError:  # the run ends on purpose: what is being saved is still wanted
            with contextlib.suppress(CheckpointError):
                self.saving.finish()
            raise

    def _run(self) -> Outcome:
        for note in self.task.notes:
            self.report.say(note)
        state = self._resume()
        total_steps = self.task.totals.steps
        outcome: Outcome = "done"
        self.interval = self._interval()
        with self.task.steps(state.data_step) as batches:
            while state.step < total_steps and not gave_up(self.recipe.early_stopping, state.best):
                batch, targets, stop = self._next(batches, state.step)
                if stop:
                    outcome = "stopped"
                    break
                if self._is_skipped(batch):
                    state = self._skip(state, batch)
                    continue
                self._enter_phase(self.task.phase_at(batch.data_step))
                before, state = state, self._step(state.after(batch), batch, targets)
                if state.step <= before.step:
                    continue  # rolled back: evaluated and saved it is already
                done = state.step == total_steps
                if self._due(state.step, self.recipe.evaluate.every_steps) or (done and self.task.has_valid):
                    state = self._judged(state, self._evaluate(state))
                is_best = state.best is not None and state.best["step"] == state.step
                if is_best or done or self._due(state.step, self.recipe.checkpoint.every_steps):
                    self._save(state)
        if state.step and self.saved_step != state.step:
            self._save(state)
        self.saving.finish()
        if outcome == "done":
            self._finish(state)
            self.report.predictions(self.task.predictions)
        self.report.phase(RankPhase(outcome), step=state.step)
        return outcome

    def _judged(self, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        """What an evaluation means for stopping early and for the learning rate."""
        recipe = self.recipe
        plateau = plateaued(recipe.schedule.plateau, state.plateau, state.step, metrics)
        if plateau and plateau["reductions"] > (state.plateau or {"reductions": 0})["reductions"]:
            rate = learning_rate(recipe, self.task.totals.timeline, state.step, plateau)
            self.report.say(f"schedule.plateau: nothing better since step {plateau['step']}; learning rate {rate:.3g}")
        best = chosen(recipe.early_stopping, state.best, state.step, metrics)
        return replace(state, best=best, plateau=plateau)

    def _resume(self) -> TrainState:
        self.report.phase(RankPhase.LOAD, step=0)
        state, source = resume_state(self.runtime, self.task, self.run_dir)
        if source is not None:
            for line in source.skipped:
                self.report.say(line)
            self.report.say(f"resumed from {source.folder} at step {state.step}")
            self.saved_step = state.step
            self.report.phase(RankPhase.LOAD, step=state.step, last_checkpoint_step=state.step)
            for change in state.data_changes[-1:]:
                if change["step"] == state.step:  # just now: a later checkpoint is of a later step
                    self._note_data_change(change)
        return state

    def _note_data_change(self, change: dict[str, Any]) -> None:
        changed, first_row = change["changed"], change["first_row"]
        self.report.metrics({"step": change["step"] + 1, "data_changed": changed, "first_row": first_row})
        for difference in map(Difference.from_json, changed):
            self.report.say(f"--allow data-change: {difference}")
        self.report.say(f"--allow data-change: the new data begins with row {first_row}, step {change['step'] + 1}")

    def _enter_phase(self, phase: PhasePlan) -> None:
        """Make of model and engine what they are in the phase that the next step is of."""
        if phase == self.phase:
            return
        self.phase = phase
        self.task.enter_phase(phase)
        batch = self.runtime.enter_phase(phase)
        count = len(self.task.totals.timeline.phases)
        if count > 1:
            which = f"phase {phase.number + 1} of {count}, {phase.name}"
            self.report.say(f"{which}: {self._in_words(phase)}, {batch}")
            self.report.phase(RankPhase.DATA, part=which)

    def _in_words(self, phase: PhasePlan) -> str:
        """`steps 1,001 to 1,500, rows of 512 tokens, 64 a step, 70 % web + 30 % code`, and the changes to the model."""
        steps = f"steps {phase.first_step + 1:,} to {phase.first_step + phase.steps:,}"
        rows = f"rows of {phase.sequence_length:,} tokens, {phase.global_batch_rows:,} a step"
        total = sum(phase.weights)
        shares = [
            f"{100 * weight / total:.3g} % {name}"
            for name, weight in zip(self.task.sources, phase.weights, strict=bool(self.task.sources))
            if weight
        ]
        keys = [f"{name} {value:,.10g}" for name, value in phase.rope.items()]
        return ", ".join([steps, rows, *([" + ".join(shares)] if shares else []), *keys])

    def _interval(self) -> Interval:
        """One that begins now."""
        count = len(self.task.sources)
        sources = None
        if count:
            sums = torch.zeros(count, 3, dtype=torch.float64, device=self.runtime.device)
            sources = SourceSums(sums, np.zeros(count, np.int64))
        return Interval(time.perf_counter(), sources=sources)

    def _next(self, batches: Iterator[StepBatch], step: int) -> tuple[StepBatch, int, bool]:
        """The next batch, and in one small all-reduce all that ranks must agree on before they use it."""
        self.report.phase(RankPhase.DATA)
        batch = next(batches)
        self.report.phase(RankPhase.AGREE)  # from here on it may be another rank that is waited for
        flags = int(self.stop.raised), int(self.saving.look(step))
        targets, stop, save_has_failed, *digest = self.runtime.all_reduce_sum([batch.targets, *flags, *batch.digest])
        if save_has_failed:
            self.saving.finish()  # raises
        self.digest = digest_hex(np.array(digest))
        self.interval.seconds_waited += batch.seconds_waited
        return batch, int(targets), bool(stop)

    def _rows(self, batch: StepBatch) -> tuple[int, int]:
        """First and last row of the global batch."""
        return self.task.first_row(batch.data_step), self.task.first_row(batch.data_step + 1) - 1

    def _is_skipped(self, batch: StepBatch) -> bool:
        first, last = self._rows(batch)
        return any(first <= skipped_last and skipped_first <= last for skipped_first, skipped_last in self.skip_rows)

    def _skip(self, state: TrainState, batch: StepBatch) -> TrainState:
        """Pass over a batch that holds rows of `data.skip_rows`; the step is made of the next one."""
        after = state.after(batch)
        self.report.ledger(after.step, self._rows(batch), self.digest, skipped=True)
        self.report.say("data.skip_rows: passed over the rows {} to {}".format(*self._rows(batch)))
        return replace(after, step=state.step)

    def _step(self, state: TrainState, batch: StepBatch, targets: int) -> TrainState:
        """Train on a batch. Returns `state`, or where the run goes on after a rollback."""
        losses, right, source_sums = self._forward_backward(batch, targets)
        self.saving.let_step()
        self.report.phase(RankPhase.STEP)
        rate = learning_rate(self.recipe, self.task.totals.timeline, state.step - 1, state.plateau)
        applied = self.runtime.apply_step(rate)
        self.report.ledger(state.step, self._rows(batch), self.digest)
        self.report.progress(state.step)
        self.interval.steps += 1
        self.interval.tokens += self.task.totals.tokens(batch.data_step)
        self.interval.flops += self.task.totals.flops(batch.data_step)
        if not applied:
            return self._not_finite(state, batch, losses)
        if self.interval.sources is not None:
            assert batch.source_rows is not None, "a batch of several sources counts their rows"
            self.interval.sources.sums += torch.stack(source_sums).sum(dim=0)
            self.interval.sources.rows += batch.source_rows
        self.skips_in_a_row = 0
        if self._due(state.step, self.recipe.log.every_steps) or state.step in (1, self.task.totals.steps):
            self._log(state, losses, right, batch.targets, targets, rate)
            self.interval = self._interval()
        return state

    def _forward_backward(self, batch: StepBatch, targets: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The losses of the micro-batches, all right predictions, and of a mixture the micro-batches' source sums."""
        losses, right, source_sums = [], torch.zeros((), device=self.runtime.device), []
        self.report.phase(RankPhase.FORWARD)
        (batch,) = self.task.completed([batch])
        last = batch.micro_batches[-1]
        for micro_batch in seeded_micro_batches(batch, self.recipe.train.seed):
            self.report.phase(RankPhase.FORWARD)
            loss, hits = micro_batch.run(self.runtime.engine)
            if (sums := self.task.source_sums()) is not None:
                source_sums.append(sums)
            self.report.phase(RankPhase.BACKWARD)
            self.runtime.backward(loss, targets, is_last=micro_batch is last)
            losses.append(loss.detach())
            right += hits
        return losses, right, source_sums

    def _log(
        self, state: TrainState, losses: list[Tensor], right: Tensor, own_targets: int, targets: int, rate: float
    ) -> None:
        rank, world_size = self.runtime.rank, self.runtime.world_size
        sums = np.zeros((3, world_size))  # losses, targets and right predictions of each rank
        sums[:, rank] = float(torch.stack(losses).double().sum()), own_targets, float(right)
        loss_sums, rank_targets, hits = self.runtime.all_reduce_sum_float(sums)
        totals, interval = self.task.totals, self.interval
        seconds = time.perf_counter() - interval.started
        self.report.metrics(
            {
                "step": state.step,
                "loss": float(loss_sums.sum()) / targets,
                "rank_losses": (loss_sums / np.maximum(rank_targets, 1)).tolist(),
                **({"accuracy": float(hits.sum()) / targets} if self.task.counts_right else {}),
                **({} if interval.sources is None else {"sources": self._by_source(state, interval.sources)}),
                "learning_rate": rate,
                "grad_norm": self.runtime.grad_norm(),
                "tokens": totals.tokens_before(state.step),
                "tokens_per_second": interval.tokens / seconds,
                "data_wait_share": interval.seconds_waited / seconds,
                "mfu": interval.flops / seconds / self.peak_flops,
                "memory_mb": peak_memory_mb(self.runtime.device),
                "seconds_left": (totals.flops_before(totals.steps) - totals.flops_before(state.step))
                / (interval.flops / seconds),
            }
        )

    def _by_source(self, state: TrainState, sources: SourceSums) -> dict[str, dict[str, Any]]:
        """Of each source its loss, perplexity and rows since the last logged step; tokens and epochs since the start.

        Where it had no row in that time there is no loss.
        """
        own = np.column_stack([sources.sums.cpu().numpy(), sources.rows])
        everything = self.runtime.all_reduce_sum_float(own)
        read = self.task.source_tokens(state.data_step)
        found = {}
        for name, (loss_sum, right, targets, rows) in zip(self.task.sources, everything.tolist(), strict=True):
            loss = loss_sum / targets if targets else None
            tokens, epochs = read[name]
            found[name] = {
                "loss": loss,
                "perplexity": None if loss is None else perplexity(loss),
                "accuracy": right / targets if targets else None,
                "rows": int(rows),
                "tokens": tokens,
                "epochs": epochs,
            }
        return found

    def _evaluate(self, state: TrainState) -> dict[str, Any]:
        started = time.perf_counter()
        self.report.phase(RankPhase.EVALUATE)
        engine = self.runtime.engine
        engine.eval()
        with torch.no_grad():
            metrics: dict[str, Any] = self.task.evaluate(self.runtime, engine)
        engine.train()
        named = {f"valid_{name}": value for name, value in metrics.items()}
        self.report.metrics({"step": state.step, **named})
        self.scores = {name: value for name, value in named.items() if isinstance(value, int | float)}
        self.scores_step = state.step
        wanted = self.recipe.checkpoint.keep_best.metric
        if wanted is not None and f"valid_{wanted}" not in self.scores:
            raise RecipeError(
                f"checkpoint.keep_best.metric={wanted} is not measured on this data; write one of "
                f"{', '.join(name.removeprefix('valid_') for name in self.scores)}"
            )
        self.interval.started += time.perf_counter() - started
        return metrics

    def _finish(self, state: TrainState) -> None:
        """Go back to the checkpoint that evaluated best, and score the test split, which nothing was chosen by."""
        last_step = state.step
        if gave_up(self.recipe.early_stopping, state.best):
            self.report.say(f"early_stopping: nothing better since step {state.best['step'] if state.best else 0}")
        if state.best is not None and state.best["step"] != state.step:
            best = take(self.runtime, checkpoints_of(self.run_dir) / folder_name(state.best["step"]))
            state = restore_state(self.runtime, self.task, best)
            self.report.say(f"the weights are those of {best.folder}, which evaluated best")
            self.runtime.engine.eval()
            with torch.no_grad():
                self.task.evaluate(self.runtime, self.runtime.engine)  # so that its predictions are those of these
        if self.runtime.from_rank_0(tested_step(self.run_dir)) != last_step:
            self._test(last_step, state.step)

    def _test(self, last_step: int, step: int) -> None:
        """Score the test split with the weights of `step`, and write it down as the end of a run of `last_step`."""
        self.report.phase(RankPhase.EVALUATE)
        self.runtime.engine.eval()
        with torch.no_grad():
            metrics = self.task.evaluate_test(self.runtime, self.runtime.engine)
        if metrics and self.runtime.rank == 0:
            write_durably(
                self.run_dir / TEST_SCORES, json.dumps({"last_step": last_step, "step": step} | metrics) + "\n"
            )
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        if shown:
            self.report.say(f"data.test, weights of step {step}: {shown}")

    def _save(self, state: TrainState) -> None:
        started = time.perf_counter()
        self.saving.begin(state, self.scores if self.scores_step == state.step else {})
        self.saved_step = state.step
        self.interval.started += time.perf_counter() - started

    def _not_finite(self, state: TrainState, batch: StepBatch, losses: list[Tensor]) -> TrainState:
        """The gradient was not finite and was not applied; do what `on_nan` says."""
        where, rank = self._blame(state.step, batch, losses)
        self.report.say(where)

        def giving_up(words: str) -> NonFiniteError:
            error = NonFiniteError(words)
            error.blames_rank = rank
            return error

        policy = self.recipe.on_nan
        if policy == "stop":
            raise giving_up(
                f"{where}. The weights are those of step {state.step - 1}; lower optimizer.learning_rate, look at "
                f"those rows, or set on_nan: skip or rollback"
            )
        if policy == "skip":
            self.skips_in_a_row += 1
            if self.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
                raise giving_up(f"{where}: {self.skips_in_a_row} steps in a row. Resume from an older checkpoint")
            self.report.metrics({"step": state.step, "skipped": True})
            return state
        if state.rollbacks >= MAX_ROLLBACKS:
            raise giving_up(f"{where}, after {state.rollbacks} rollbacks. Lower optimizer.learning_rate")
        self.saving.finish()  # or ranks might see another newest checkpoint
        older, source = resume_state(self.runtime, self.task, self.run_dir)
        if source is None:
            raise giving_up(f"{where}, and there is no checkpoint to roll back to. Lower optimizer.learning_rate")
        self.report.metrics({"step": state.step, "rolled_back_to": older.step})
        self.report.say(f"rolled back to step {older.step}; the data goes on after row batch {batch.data_step}")
        self.saved_step = older.step
        # Weights and schedule go back, the data does not: the rows up to here are dropped.
        return replace(state, step=older.step, rollbacks=state.rollbacks + 1, best=older.best, plateau=older.plateau)

    def _blame(self, step: int, batch: StepBatch, losses: list[Tensor]) -> tuple[str, int | None]:
        """One line naming step, rank, rows and lanes of the first loss that is not finite; and the rank. Collective."""
        bad = [
            micro_batch.row_numbers.tolist()
            for micro_batch, loss in zip(batch.micro_batches, losses, strict=True)
            if not math.isfinite(float(loss)) and len(micro_batch.row_numbers)
        ]
        for rank, found in enumerate(self.runtime.gather_json(bad[:1])):
            if found:
                lanes = sorted({(row - self.task.origin[1]) % self.task.lanes for row in found[0]})
                where = f"rank {rank} is not finite (rows {_span(found[0])}, lanes {_span(lanes)})"
                return f"step {step}: the loss on {where}", rank
        ranks = f"all {self.runtime.world_size} ranks"
        return f"step {step}: the gradient is not finite, though the loss on {ranks} is", None

    @staticmethod
    def _due(step: int, every: int | None) -> bool:
        return every is not None and step % every == 0


def tested_step(run_dir: Path) -> int | None:
    """The last step of the run whose end was tested; None where none was."""
    try:
        step: int = json.loads((run_dir / TEST_SCORES).read_bytes())["last_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step


def _span(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"{numbers[0]} … {numbers[-1]}"
