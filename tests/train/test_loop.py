"""The loop on real ranks and a real run folder: stopping, resuming, evaluating, and what it does when a loss is NaN."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import RankError, run_ranks
from training import Poison, RecipeMaker, poisoned, training

from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.recipe.schema import Recipe
from dstrain.recipe.training import KeepBest
from dstrain.tasks.task import StepBatch, Task
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.reporting import Reporter

pytestmark = pytest.mark.ranks
STEPS = 8
DROPOUT = ("model.config.hidden_dropout_prob=0.1", "model.config.attention_probs_dropout_prob=0.1")
METRICS = {
    "step", "loss", "rank_losses", "accuracy", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
    "data_wait_share", "mfu", "memory_mb", "seconds_left",
    "time_unix", "attempt", "from_step", "attempt_seconds", "run_seconds", "goodput",
}  # fmt: skip

# What befalls a rank at a data step: {rank: {data step: "stop" | "loss" | "gradient"}}
Events = dict[int, dict[int, str]]
Run = tuple[Recipe, Path, Events]


def run_loops(rank: int, world: int, runs: list[Run]) -> list[str]:
    """On a rank: one loop after the other, each in its own run folder or in one that another left."""
    outcomes = []
    for recipe, folder, events in runs:
        with training(recipe, Poison) as (runtime, task):
            trouble(task, events.get(rank, {}))
            with Reporter(runtime, recipe, folder, 1, task.totals.steps) as report:
                outcomes.append(Loop(runtime, task, folder, report, StopRequest()).run())
    return outcomes


def trouble(task: Task, events: dict[int, str]) -> None:
    """Let events happen to this rank as its stream hands out the batches of their data steps."""
    steps, evaluate = task.steps, task.evaluate

    @contextmanager
    def troubled(data_step: int) -> Iterator[Iterator[StepBatch]]:
        with steps(data_step) as batches:
            yield (befall(batch, events.get(batch.data_step, "")) for batch in batches)

    def befall(batch: StepBatch, event: str) -> StepBatch:
        if event == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            event = ""
        return poisoned(batch, {1: event})  # its second micro-batch

    task.steps = troubled  # type: ignore[method-assign]
    task.evaluate = lambda runtime, module: evaluate(runtime, lambda **inputs: module(poison="", **inputs))  # type: ignore[method-assign, arg-type, return-value]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def ledger(folder: Path) -> dict[int, str]:
    """Step → digest, the last entry of a step."""
    return {line["step"]: line["digest"] for line in lines(folder / "ledger.jsonl")}


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))


# ------------------------------------------------------------------ stopping and resuming


@pytest.mark.parametrize("dropout", [(), DROPOUT], ids=["plain", "dropout"])
def test_a_stop_of_one_rank_stops_all_and_resuming_is_as_if_it_never_happened(
    dropout: tuple[str, ...], tmp_path: Path, tiny_recipe: RecipeMaker
) -> None:
    recipe = tiny_recipe(f"train.steps={STEPS}", "train.zero.stage=2", "train.precision=bf16", *dropout)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs: list[Run] = [(recipe, whole, {}), (recipe, parts, {1: {3: "stop"}}), (recipe, parts, {0: {5: "stop"}})]
    for outcomes in run_ranks(2, run_loops, runs):
        assert outcomes == ["done", "stopped", "stopped"]
    assert checkpoints(whole) == [STEPS]
    assert checkpoints(parts) == [3, 5]
    assert sorted(losses(parts)) == sorted(ledger(parts)) == [1, 2, 3, 4, 5]
    assert run_ranks(2, run_loops, [(recipe, parts, {})]) == [["done"], ["done"]]  # new processes
    assert ledger(parts) == ledger(whole)
    assert losses(parts) == losses(whole)
    assert len(lines(parts / "ledger.jsonl")) == STEPS


def test_any_number_of_ranks_goes_on_with_the_same_rows_and_losses(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def recipe(stage: int, micro_batch_rows: int) -> Recipe:
        return tiny_recipe(
            f"train.steps={STEPS}", f"train.zero.stage={stage}", f"train.micro_batch_rows={micro_batch_rows}"
        )

    run_ranks(1, run_loops, [(recipe(0, 8), whole, {})])
    for world, stage, micro_batch_rows, step in ((2, 1, 1, 2), (3, 2, 4, 4), (7, 3, 1, 6)):
        run_ranks(world, run_loops, [(recipe(stage, micro_batch_rows), parts, {world - 1: {step: "stop"}})])
    run_ranks(5, run_loops, [(recipe(0, 4), parts, {})])
    assert checkpoints(parts)[-1] == STEPS
    assert ledger(parts) == ledger(whole)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


# ------------------------------------------------------------------ what is logged and evaluated


def test_the_best_by_what_is_not_measured_is_refused(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("checkpoint.every_steps=1", "evaluate.every_steps=1")
    kept = recipe.checkpoint.model_copy(update={"keep_best": KeepBest(metric="auroc")})  # which some data do not have
    with pytest.raises(RankError, match=r"keep_best\.metric=auroc is not measured on this data; write one of loss, "):
        run_ranks(1, run_loops, [(recipe.model_copy(update={"checkpoint": kept}), tmp_path, {})])


def test_metrics_and_evaluation(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    overrides = ("train.steps=4", "schedule.warmup_steps=0", "evaluate.every_steps=2", "log.every_steps=2")
    frozen = ("optimizer.learning_rate=1e-30",)  # evaluations of the same weights
    rules = ("every_steps=2", "keep_last=1", "keep_best.metric=valid_loss", "keep_best.best=highest")
    rules = tuple(f"checkpoint.{rule}" for rule in rules)
    runs: list[Run] = [
        (tiny_recipe(*overrides, *rules), tmp_path / "run", {}),
        (tiny_recipe(*overrides, *frozen), tmp_path / "same", {}),
    ]
    by_world: dict[int, list[dict[str, Any]]] = {}
    for world in (1, 2):
        here: list[Run] = [(recipe, folder / str(world), events) for recipe, folder, events in runs]
        run_ranks(world, run_loops, here)
        found = lines(tmp_path / "run" / str(world) / "metrics.jsonl")
        trained, evaluated = ([line for line in found if name in line] for name in ("loss", "valid_loss"))
        assert [line["step"] for line in trained] == [1, 2, 4]
        assert all(set(line) == METRICS for line in trained)
        assert trained[-1]["tokens"] == 4 * 8 * 32
        assert all(len(line["rank_losses"]) == world for line in trained)
        assert trained[-1]["loss"] == pytest.approx(np.mean(trained[-1]["rank_losses"]), rel=1e-9)
        assert trained[0]["loss"] == pytest.approx(np.log(256), rel=0.1)
        assert all(0 <= line["data_wait_share"] <= 1 and line["tokens_per_second"] > 0 for line in trained)
        first, *_, last = trained
        passed = sum(last["run_seconds"].values()) - sum(first["run_seconds"].values())
        assert passed == pytest.approx(last["time_unix"] - first["time_unix"], abs=0.05)  # no moment is missing
        assert last["attempt_seconds"]["evaluating"] > 0 and 0 < last["goodput"] < 1
        assert [line["step"] for line in evaluated] == [2, 4]
        assert all(set(line) == {"step", "valid_loss", "valid_perplexity", "valid_accuracy"} for line in evaluated)
        scored = {line.pop("step"): dict(line) for line in map(dict, evaluated)}
        assert checkpoints(tmp_path / "run" / str(world)) == [2, 4], (
            "the worst of those that were evaluated, and the last"
        )
        for step, scores in scored.items():
            assert Manifest.read(checkpoint_folder(tmp_path / "run" / str(world), step)).scores == scores
        assert evaluated[1]["valid_perplexity"] == pytest.approx(np.exp(evaluated[1]["valid_loss"]))
        by_world[world] = evaluated
        first, second = (
            line for line in lines(tmp_path / "same" / str(world) / "metrics.jsonl") if "valid_loss" in line
        )
        assert first["valid_loss"] == second["valid_loss"]
    for one, two in zip(by_world[1], by_world[2], strict=True):
        assert one == pytest.approx(two, rel=1e-5)


# ------------------------------------------------------------------ a loss that is not finite


def test_on_nan_stop_names_step_rank_rows_and_lanes(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("train.steps=8", "on_nan=stop", "train.zero.stage=1")
    # Rank 1 has rows 1, 3, 5, 7 of a step of 8; its second micro-batch at data step 2 are rows 16 + 5 and 16 + 7.
    message = r"NonFiniteError: step 3: the loss on rank 1 is not finite \(rows 21, 23, lanes 5, 7\)\. The weights are "
    message += r"those of step 2;"
    with pytest.raises(RankError, match=message):
        run_ranks(2, run_loops, [(recipe, tmp_path, {1: {2: "loss"}})])
    assert sorted(losses(tmp_path)) == [1, 2]


@pytest.mark.parametrize("stage", [0, 2])
def test_on_nan_skip_goes_on_without_the_rows(stage: int, tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("train.steps=5", "on_nan=skip", f"train.zero.stage={stage}", "train.precision=bf16")
    outcomes = run_ranks(2, run_loops, [(recipe, tmp_path, {1: {2: "gradient"}, 0: {3: "loss"}})])
    assert outcomes == [["done"], ["done"]]
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found if line.get("skipped")] == [3, 4]
    assert sorted(losses(tmp_path)) == [1, 2, 5]
    assert sorted(ledger(tmp_path)) == [1, 2, 3, 4, 5]


def test_on_nan_skip_gives_up_when_it_does_not_end(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("train.steps=50", "on_nan=skip")
    with pytest.raises(RankError, match=r"NonFiniteError: step 8: .*6 steps in a row"):
        run_ranks(1, run_loops, [(recipe, tmp_path, {0: dict.fromkeys(range(2, 50), "loss")})])


def test_on_nan_rollback_returns_to_the_checkpoint_and_never_sees_the_rows_again(
    tmp_path: Path, tiny_recipe: RecipeMaker
) -> None:
    recipe = tiny_recipe("train.steps=6", "on_nan=rollback", "train.zero.stage=3", "checkpoint.every_steps=2")
    outcomes = run_ranks(2, run_loops, [(recipe, tmp_path, {1: {3: "loss"}})])
    assert outcomes == [["done"], ["done"]]
    assert checkpoints(tmp_path) == [4, 6]
    found = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["rolled_back_to"]) for line in found if "rolled_back_to" in line] == [(4, 2)]
    assert [line["step"] for line in found if "loss" in line] == [1, 2, 3, 3, 4, 5, 6]
    # Steps 3 to 6 of the second try are made of the rows after the bad ones.
    first_rows = [(line["step"], line["rows"][0] // 8) for line in lines(tmp_path / "ledger.jsonl")]
    assert first_rows == [(1, 0), (2, 1), (3, 2), (4, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    manifest = Manifest.read(tmp_path / "checkpoints/step-0000000006")
    assert (manifest.data_step, manifest.rollbacks, manifest.optimizer_steps) == (8, 1, 6)


def test_on_nan_rollback_without_a_checkpoint_says_so(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("train.steps=6", "on_nan=rollback")
    with pytest.raises(
        RankError, match=r"NonFiniteError: step 2: the gradient is not finite.*no checkpoint to roll back to"
    ):
        run_ranks(1, run_loops, [(recipe, tmp_path, {0: {1: "gradient"}})])


def test_on_nan_rollback_gives_up_after_a_limit(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("train.steps=50", "on_nan=rollback", "checkpoint.every_steps=2")
    with pytest.raises(RankError, match=r"NonFiniteError: step 3: .*, after 5 rollbacks\. Lower optimizer"):
        run_ranks(1, run_loops, [(recipe, tmp_path, {0: dict.fromkeys(range(2, 50), "loss")})])
    rolled_back = [line["rolled_back_to"] for line in lines(tmp_path / "metrics.jsonl") if "rolled_back_to" in line]
    assert rolled_back == [2] * 5
    assert checkpoints(tmp_path) == [2]
