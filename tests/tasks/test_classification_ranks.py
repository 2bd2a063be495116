"""A classifier trained for real: two ranks under ZeRO-3, resumed on one rank without: same rows, same model."""

import json
from pathlib import Path
from typing import Any

import pytest
from labelled import RECIPE, write_examples
from ranks import run_ranks

from dstrain.data.ledger import compare_ledgers
from dstrain.proof.replay import Replay, replay
from dstrain.recipe.load import load_recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.report.runs import read_metrics
from dstrain.train.main import run_rank

pytestmark = pytest.mark.ranks


def train(rank: int, world: int, run_dir: Path) -> str:
    return run_rank(run_dir, 1)


def trained(folder: Path, name: str, world: int, steps: int, stage: int) -> dict[str, Any]:
    """Train (on) to `steps` and return the last evaluation."""
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, architecture="bert"))
    overrides = [f"train.steps={steps}", "train.epochs=null", f"train.zero.stage={stage}", "schedule.name=constant"]
    recipe = load_recipe(folder / "recipe.yaml", [*overrides, "log.tensorboard=false"]).recipe
    run_dir: Path = folder / name
    run_dir.mkdir(exist_ok=True)
    (run_dir / "recipe.yaml").write_text(resolved_yaml(recipe))
    assert set(run_ranks(world, train, run_dir)) == {"done"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluation: dict[str, Any] = next(line for line in reversed(lines) if "valid_loss" in line)
    assert evaluation["step"] == steps
    return evaluation


def test_stopped_on_two_ranks_and_resumed_on_one(tmp_path: Path) -> None:
    folder = write_examples(tmp_path)
    whole = trained(folder, "whole", world=1, steps=6, stage=0)
    half = trained(folder, "parts", world=2, steps=3, stage=3)
    parts = trained(folder, "parts", world=1, steps=6, stage=0)
    comparison = compare_ledgers(folder / "whole" / "ledger.jsonl", folder / "parts" / "ledger.jsonl")
    assert (comparison.common_steps, comparison.first_difference) == (6, None)
    assert parts["valid_loss"] == pytest.approx(whole["valid_loss"], rel=1e-5)
    assert half["valid_loss"] != pytest.approx(whole["valid_loss"], rel=1e-5)
    assert parts["valid_report"]["rows"] == half["valid_report"]["rows"] == 7


def replay_step(rank: int, world: int, run_dir: Path, step: int) -> Replay:
    return replay(run_dir, step, None, None, trace=False)


def test_a_step_computed_again_has_the_losses_and_names_the_lines(tmp_path: Path) -> None:
    folder = write_examples(tmp_path)
    trained(folder, "run", world=2, steps=4, stage=2)
    (found,) = run_ranks(1, replay_step, folder / "run", 4)
    logged = read_metrics(folder / "run" / "metrics.jsonl").training[-1]
    assert (logged["step"], found.same_rows) == (4, True)
    assert [one.loss for one in found.ranks] == pytest.approx(logged["rank_losses"], abs=1e-5)
    lines = (folder / "train.csv").read_text().splitlines()
    assert len(found.documents) == 8
    for document in found.documents:
        number = int(document.sample.split(",")[0].removeprefix("line "))
        assert lines[number - 1].startswith(document.text)
