"""The learning rate that falls on a plateau: when, how far, the same after a resume, and in a replay."""

import json
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from dstrain.checkpoint.manifest import Manifest
from dstrain.cli import main
from dstrain.errors import RecipeError
from dstrain.proof.replay import Replay, replay
from dstrain.recipe.training import Plateau
from dstrain.train.best import Best, plateaued

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from labelled import write_examples
from test_heads import live, write_recipe


def fallen(rule: Plateau, values: list[float]) -> list[int]:
    """How often the rate has fallen after each evaluation."""
    state: Best | None = None
    found = []
    for step, value in enumerate(values):
        state = plateaued(rule, state, step, {rule.metric: value})
        found.append(state["reductions"] if state else 0)
    return found


def test_it_falls_after_as_many_evaluations_without_better_as_the_patience_lasts() -> None:
    rule = Plateau(metric="loss", patience=2)
    assert fallen(rule, [1.0, 1.1, 1.0, 1.0, 1.0, 0.9, 0.9, 0.8, 0.9, 0.9]) == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3]
    assert fallen(rule, [float("nan"), 1.0, float("nan"), float("nan"), 0.9]) == [0, 0, 0, 1, 1]
    rising = Plateau(metric="f1", direction="maximize", patience=1, min_delta=0.1)
    assert fallen(rising, [0.1, 0.15, 0.3, 0.2]) == [0, 1, 1, 2]
    with pytest.raises(RecipeError, match=r"plateau\.metric=f1 is not measured on this data; use one of loss"):
        plateaued(rising, None, 1, {"loss": 1.0})


PLATEAU = [
    "schedule={name: plateau, warmup_steps: 2, min_lr_ratio: 0.2,"
    " plateau: {metric: loss, direction: maximize, patience: 1, factor: 0.5}}",  # its first loss is the highest
    "evaluate.every_steps=1",
    "checkpoint={every_steps: 2, keep_last: 9}",
]


def replayed(rank: int, world: int, run_dir: Path, step: int) -> Replay:
    return replay(run_dir, step, None, None, trace=False)


@pytest.mark.ranks
def test_a_run_falls_alike_after_a_resume_and_in_a_replay(tmp_path: Path) -> None:
    write_examples(tmp_path)
    path = write_recipe(tmp_path, "tags")
    ((whole,),) = run_ranks(1, live, path, tmp_path / "whole", [7], PLATEAU)
    ((_, resumed),) = run_ranks(1, live, path, tmp_path / "parts", [3, 7], PLATEAU)
    assert whole == resumed
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert list(rates.values()) == [5e-3, 1e-2, 5e-3, 2.5e-3, 2e-3, 2e-3, 2e-3], "halved, down to a fifth"
    assert Manifest.read(tmp_path / "parts" / "checkpoints" / "step-0000000003").plateau == {
        "step": 1,
        "value": max(line["valid_loss"] for line in lines if "valid_loss" in line),
        "since": 0,
        "reductions": 2,
    }
    (again,) = run_ranks(1, replayed, tmp_path / "whole", 6)
    assert again.steps_trained == 1
    assert (again.loss, again.gradient_norm) == (
        pytest.approx(again.logged_loss, abs=1e-6),
        pytest.approx(again.logged_gradient_norm, rel=1e-5),
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["schedule.name=plateau"], "schedule.plateau is missing; name a metric"),
        (["schedule.plateau.metric=loss"], "is given, and schedule.name=constant; set that to plateau"),
        (["schedule={name: plateau, plateau: {metric: loss}}"], "needs evaluations to go by; set evaluate.every_steps"),
        (["model.unfreezing={}"], "give exactly one of them"),
        (["model.unfreezing.every_epochs=1"], "needs a length in train.epochs; give every_steps"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(write_recipe(tmp_path, "tags")), *overrides]) == 2
    assert words in capsys.readouterr().err
