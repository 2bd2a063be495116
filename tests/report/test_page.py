"""The page: what it shows of each task, and nothing where there is nothing to show."""

import json
from pathlib import Path
from typing import Any

from test_report import evaluation, run_folder, training

from dstrain.checkpoint.manifest import Manifest
from dstrain.report.page import write_report


def written(folder: Path, judged: list[dict[str, Any]]) -> tuple[str, str]:
    """report.md and report.html of a run with these predictions."""
    lines = [
        {"line": number, "true": f"true {number}", "predicted": "?", "text": f"text {number}", **each}
        for number, each in enumerate(judged, start=2)
    ]
    (folder / "predictions-valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([folder], folder / "report.html", folder / "report.md")
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_labels_are_those_of_the_evaluation_that_the_run_ended_with(tmp_path: Path) -> None:
    """With early stopping the predictions are those of the best weights, which are not the last."""
    folder = run_folder(tmp_path / "stopped")
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        recipe + "evaluate: {every_steps: 20}\nearly_stopping: {metric: loss, patience: 1}\n"
    )
    best, last = evaluation(20), evaluation(40)
    for one, name in ((best, "the best"), (last, "the last")):
        one["valid_report"]["classification_report"] = name
    lines = [training(10, 2.0), best, training(30, 0.5), last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = Manifest(40, 40, 40, [], 0, 0, 0.0, {}, {}, {}, {}, {}, {}, best={"step": 20, "value": 0.6, "since": 1})
    (folder / "checkpoints" / "step-0000000050").rmdir()
    (folder / "checkpoints" / "step-0000000040" / "manifest.json").write_text(manifest.text())
    markdown, _ = written(folder, [{"scores": {"accuracy": 1.0}, "badness": 0.0}])
    assert "the best" in markdown and "the last" not in markdown
