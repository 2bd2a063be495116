"""Sweeps on real runs: killed and gone on with, one after another or side by side, stopped early, and reproducible."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import main
from dstrain.report.runs import read_metrics

pytestmark = pytest.mark.slow

DSTRAIN = [sys.executable, "-m", "dstrain"]


def sweep(recipe: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [*DSTRAIN, "sweep", str(recipe), "--dir", str(folder), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    summary: dict[str, Any] = json.loads(out)
    return summary


def loss(run: str | Path) -> float:
    value: float = read_metrics(Path(run) / "metrics.jsonl").evaluations[-1]["valid_loss"]
    return value


def test_a_killed_sweep_goes_on_with_its_trial_and_its_best_recipe_gives_the_same_loss(
    sweep_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = sweep_recipe("train.steps=60", "checkpoint.every_steps=5", trials=3), tmp_path / "sweep"
    first = sweep(recipe, folder, "--jobs", "2")
    metrics = folder / "trial-0000" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 8):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    stopped = ended(first, 75)
    assert "running" in [trial["state"] for trial in stopped["trials"]]
    before = {trial["number"]: trial["parameters"] for trial in stopped["trials"]}
    summary = ended(sweep(recipe, folder, "--jobs", "2"))
    trials = summary["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    assert len({json.dumps(trial["parameters"]) for trial in trials}) == 3
    for trial in trials:
        assert before.get(trial["number"], trial["parameters"]) == trial["parameters"]
        assert trial["value"] == pytest.approx(loss(trial["run"]), abs=0)
        steps = [entry["step"] for entry in read_metrics(Path(trial["run"]) / "metrics.jsonl").training]
        assert steps == list(range(1, 61))
    best = min(trials, key=lambda trial: trial["value"])
    assert summary["best"] == str(folder / "best.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    again = tmp_path / "again"
    subprocess.run(
        [*DSTRAIN, "run", summary["best"], "--run-dir", str(again)], check=True, capture_output=True, env=environment
    )
    assert loss(again) == pytest.approx(best["value"], rel=1e-6)
    text = (folder / "best.yaml").read_text()
    assert "sweep:" not in text and f"trials of {recipe}: loss {best['value']:.6g}" in text


def test_a_hopeless_trial_is_stopped_early(sweep_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    from dstrain.recipe.load import load_recipe
    from dstrain.sweep.study import open_study

    recipe = sweep_recipe("train.steps=100000", "evaluate.every_steps=2", trials=6, pruner="median")
    text = recipe.read_text().replace("    train.micro_batch_rows: {choices: [2, 4]}\n", "")
    recipe.write_text(text)
    loaded = load_recipe(recipe)
    assert loaded.sweep is not None
    identity = loaded.recipe.model_dump(mode="json", by_alias=True)
    study = open_study(tmp_path / "sweep", loaded.sweep, identity, shared=False)
    rates = {"optimizer.learning_rate": FloatDistribution(1e-5, 1e-2, log=True)}
    for _ in range(5):  # better than any real one
        study.add_trial(
            create_trial(
                params={"optimizer.learning_rate": 1e-3},
                distributions=rates,
                value=0.01,
                intermediate_values={2: 0.01, 4: 0.01},
                state=TrialState.COMPLETE,
            )
        )
    summary = ended(sweep(recipe, tmp_path / "sweep"))
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 5 + ["pruned"]
    assert read_metrics(tmp_path / "sweep/trial-0005/metrics.jsonl").training[-1]["step"] < 1000
    assert optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db").best_value == 0.01


def test_a_folder_of_another_sweep_is_refused(
    sweep_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dstrain.recipe.load import load_recipe
    from dstrain.sweep.study import open_study

    recipe = sweep_recipe()
    sweep_section = load_recipe(recipe).sweep
    assert sweep_section is not None
    open_study(tmp_path / "sweep", sweep_section, {"other": "recipe"}, shared=False)
    assert main(["sweep", str(recipe), "--dir", str(tmp_path / "sweep")]) == 2
    assert "holds a sweep with another recipe; give another --dir" in capsys.readouterr().err


def test_trials_that_all_fail_end_the_sweep_with_their_own_words(
    sweep_recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = sweep_recipe(trials=20)
    assert main(["sweep", str(recipe), "--dir", str(tmp_path / "sweep"), "--procs-per-node", "9"]) == 2
    error = capfd.readouterr().err
    assert "3 trials failed and none succeeded" in error
    assert "data.lanes=8 is the most; use 1 to 8 ranks" in error


# ---------------------------------------------------------------- the section


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("metric: loss", "metric: f1", "tiny.yaml:LINE: sweep.metric=f1 is nothing that evaluations of "),
        ("metric: loss", "metric: 3", 'tiny.yaml:LINE: sweep.metric=3 must be text; write it in quotes: "3"'),
        ("direction: minimize", "direction: down", "sweep.direction=down is not one of minimize, maximize"),
        ("trials: 3", "trials: 0", "sweep.trials=0 must be more than 0"),
        ("sampler: random", "sampelr: random", "sweep.sampelr is an unknown key; did you mean sweep.sampler?"),
        ("sampler: random", "sampler: grid", "sweep.parameters.optimizer.learning_rate is a range, and a grid needs"),
        ("low: 1e-5", "low: 1", "optimizer.learning_rate goes from 1 to 0.01; low must be less than high"),
        ("low: 1e-5", "low: 0.0", "begins at 0.0, and a logarithm needs more than 0"),
        ("low: 1e-5", "low: -1", "begins at -1, and a logarithm needs"),
        ("low: 1e-5, ", "", "has neither both ends of a range nor choices"),
        ("choices: [2, 4]", "choices: [2]", "needs two different choices at least"),
        ("choices: [2, 4]", "choices: [2, 2]", "needs two different choices at least"),
        ("choices: [2, 4]", "choices: 2", "must be a list"),
        ("choices: [2, 4]", "low: 1, choices: [2, 4]", "has choices and a range; keep one of them"),
        ("choices: [2, 4]", "choices: [2, 0]", "sweep.parameters.train.micro_batch_rows: command line: train."),
        ("train.micro_batch_rows:", "train.micro_batch_row:", "train.micro_batch_row is an unknown key; did you mean"),
        ("low: 1e-5, high: 1e-2, log: true", "low: -1.5, high: 1e-2", "optimizer.learning_rate=-1.5 must be more than"),
        ("low: 1e-5", "lwo: 1e-5", "sweep.parameters.optimizer.learning_rate.lwo is an unknown key; did you mean"),
        ("  metric: loss\n", "", "sweep.metric is missing; add it"),
    ],
)
def test_a_mistake_in_the_section_is_named_before_anything_starts(
    sweep_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
    says: str,
) -> None:
    recipe = sweep_recipe()
    text = recipe.read_text()
    assert before in text
    line = text[: text.index(before)].count("\n") + 1
    recipe.write_text(text.replace(before, after))
    assert main(["sweep", str(recipe), "--dir", str(tmp_path / "sweep")]) == 2
    assert says.replace("LINE", str(line)) in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_recipe_without_the_section_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes/pretrain/bert-small.yaml"
    assert main(["sweep", str(recipe), "--dir", str(tmp_path / "sweep")]) == 2
    assert capsys.readouterr().err
