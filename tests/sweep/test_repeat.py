"""The same recipe with several seeds and folds: what differs, mean and deviation, and what was said out of fold."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from optuna.trial import TrialState

from dstrain.cli import main
from dstrain.recipe.load import load_recipe
from dstrain.sweep.command import summary_text, write_best
from dstrain.sweep.repeat import repeats
from dstrain.sweep.study import by_values, grid_point, open_study, take_trial

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from labelled import EXAMPLES, RECIPE, write_examples

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A tiny classifier, one epoch."""
    path = write_examples(tmp_path) / "recipe.yaml"
    text = RECIPE.format(folder=tmp_path, architecture="bert").replace("epochs: 3", "epochs: 1")
    path.write_text(text + "log: {tensorboard: false}\n")
    return path


def test_seeds_and_folds_end_in_mean_and_deviation(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "repeated"
    command = ["sweep", str(recipe), "data.valid=null", "data.folds=2", "--seeds", "2", "--dir", str(folder)]
    assert main([*command, "--jobs", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 4
    runs = [Path(trial["run"]) for trial in summary["trials"]]
    recipes = [yaml.safe_load((run / "recipe.yaml").read_text()) for run in runs]
    drawn = {(one["train"]["seed"], one["data"]["seed"], one["data"]["fold"]) for one in recipes}
    assert drawn == {(seed, seed, fold) for seed in (0, 1) for fold in (0, 1)}
    assert {one["data"]["split_seed"] for one in recipes} == {3}, "the recipe's data.seed, whatever the seed"
    held_out = {}
    for run, one in zip(runs, recipes, strict=True):
        lines = [json.loads(line)["line"] for line in (run / "predictions-valid.jsonl").read_text().splitlines()]
        held_out[one["data"]["seed"], one["data"]["fold"]] = set(lines)
    assert held_out[0, 0] == held_out[1, 0] and held_out[0, 1] == held_out[1, 1]
    assert held_out[0, 0] | held_out[0, 1] == set(range(2, EXAMPLES + 2))
    assert not held_out[0, 0] & held_out[0, 1]
    for seed in (0, 1):
        pooled = [json.loads(line) for line in (folder / f"out-of-fold-seed-{seed}.jsonl").read_text().splitlines()]
        assert [each["line"] for each in pooled] == list(range(2, EXAMPLES + 2))
        assert all(each["line"] in held_out[seed, each["fold"]] for each in pooled)
    losses = [trial["value"] for trial in summary["trials"]]
    found = summary["scores"]["held-out loss"]
    assert found["mean"] == pytest.approx(fmean(losses))
    assert found["deviation"] == pytest.approx(stdev(losses)) and found["deviation"] > 0
    assert (found["least"], found["most"], found["runs"]) == (min(losses), max(losses), 4)

    assert main(command) == 0, "there is nothing left to do"
    shown = capsys.readouterr().out
    assert f"{fmean(losses):.4f} ± {stdev(losses):.4f}  {min(losses):.4f}  {max(losses):.4f}     4" in shown
    assert "4 of 4 trials done" in shown
    report = (folder / "report.md").read_text()
    assert "## Mean and deviation" in report and "## Scores, out of fold seed 1" in report
    assert f"| held-out loss | {fmean(losses):.4f} | {stdev(losses):.4f} |" in report
    assert main(["report", *map(str, runs)]) == 0
    assert "mean ± deviation" in capsys.readouterr().out


def test_a_grid_with_seeds_has_each_point_once_and_chooses_by_the_mean(recipe: Path, tmp_path: Path) -> None:
    section = {
        "metric": "loss",
        "direction": "minimize",
        "trials": 10,
        "sampler": "grid",
        "pruner": "none",
        "parameters": {
            "optimizer.learning_rate": {"choices": [0.01, 0.0001, 0.001]},
            "train.seed, data.seed": {"choices": [5, 6]},
        },
    }
    recipe.write_text(recipe.read_text() + yaml.safe_dump({"sweep": section}))
    sweep = load_recipe(recipe).sweep
    assert sweep is not None
    study = open_study(tmp_path / "grid", sweep, {}, shared=False)
    study.enqueue_trial(grid_point(sweep, 0))  # as a worker that died here left it
    values = []
    for taken in take_trial(study, tmp_path / "grid", sweep):
        values.append(taken.values)
        rate, seed = taken.values.values()
        if taken.trial.number != 3:  # one fails: it counts in no mean
            study.tell(taken.trial, {0.01: 3.0, 0.0001: 1.5, 0.001: 1.0}[float(rate)] + (int(seed) == 6))
        else:
            study.tell(taken.trial, state=TrialState.FAIL)
    assert values == [
        {"optimizer.learning_rate": rate, "train.seed, data.seed": seed}
        for rate in (0.01, 0.0001, 0.001)
        for seed in (5, 6)
    ]
    first, second, third = by_values(study)
    rates = [group.values["optimizer.learning_rate"] for group in (first, second, third)]
    assert rates == [0.001, 0.0001, 0.01], "the best mean, and not the best run"
    assert (first.mean, first.numbers, second.deviation) == (1.5, [4, 5], 0.0)
    assert third.deviation == pytest.approx(0.5**0.5)
    args = Namespace(recipe=str(recipe), overrides=["train.seed=1"])
    assert write_best(study, tmp_path / "grid", args, sweep)["best"] == str(tmp_path / "grid" / "best.yaml")
    best = load_recipe(tmp_path / "grid" / "best.yaml").recipe
    assert (best.optimizer.learning_rate, best.train.seed, best.data.seed) == (0.001, 1, 3)
    assert "the mean of 2 runs" in (tmp_path / "grid" / "best.yaml").read_text()
    assert "1.5 ± 0.71 (2 runs)  optimizer.learning_rate=0.001" in summary_text(study, tmp_path, sweep)


def test_what_cannot_be_repeated_is_said(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(recipe), "--seeds", "1"]) == 2
    assert "--seeds 1 of a recipe without data.folds is one run" in capsys.readouterr().err
    folded = load_recipe(recipe, ["data.valid=null", "data.folds=5"]).recipe
    assert repeats(folded, 1).parameters["data.fold"].choices == (0, 1, 2, 3, 4)
    assert main(["plan", str(recipe), "data.folds=5"]) == 2
    assert "is one of 2 held-out sets" in capsys.readouterr().err
    assert main(["plan", str(recipe), "data.valid=null", "data.folds=5", "data.fold=5"]) == 2
    assert "is none of data.folds=5, which are numbered 0 to 4" in capsys.readouterr().err
