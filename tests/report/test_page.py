"""The page: what it shows of each task, and nothing where there is nothing to show."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import evaluation, run_folder, training

from dstrain.checkpoint.manifest import Manifest
from dstrain.report.intervals import intervals
from dstrain.report.page import write_report
from dstrain.tasks.answer_scores import Judged, answer_scores
from dstrain.tasks.calibration import binned
from dstrain.tasks.rank_scores import judged_ranking, mean_scores
from dstrain.tasks.scores import label_scores, label_set_scores, number_scores
from dstrain.tasks.tags import tag_scores
from dstrain.tasks.writing_scores import bleu_scores, rouge_scores

WITHOUT = {"judged", "report"}


def of_labels(draw: np.random.Generator) -> dict[str, Any]:
    labels = ["a", "b", "c", "d"][: draw.integers(2, 5)]
    true = draw.integers(0, len(labels), 20)
    return label_scores(labels, true, np.eye(len(labels))[true] + draw.normal(size=(20, len(labels))))


def of_sets(draw: np.random.Generator) -> dict[str, Any]:
    true = draw.integers(0, 2, (20, 3)) * [1, 1, draw.integers(0, 2)]
    return label_set_scores(["a", "b", "c"], true, true + draw.normal(size=(20, 3)) - 0.5)


def of_numbers(draw: np.random.Generator) -> dict[str, Any]:
    true = draw.normal(size=20)
    return number_scores(true, true + draw.normal(size=20))


def of_tags(draw: np.random.Generator) -> dict[str, Any]:
    tags = ["O", "B-x", "I-x", "B-y", "I-y"]
    true = [[tags[n] for n in draw.integers(0, 5, size)] for size in draw.integers(1, 9, 20)]
    return tag_scores(true, [[tag if draw.random() < 0.7 else "O" for tag in one] for one in true], tags)


def of_answers(draw: np.random.Generator) -> dict[str, Any]:
    texts = ["red", "red apple", "blue"]
    judged = [
        Judged(
            texts[draw.integers(3)], draw.normal(), texts[: draw.integers(0, 3)], [(text, 0.0) for text in (*texts, "")]
        )
        for _ in range(20)
    ]
    return answer_scores(judged, unanswerable=bool(draw.integers(2)), threshold=0.1, language="en")


def of_rankings(draw: np.random.Generator) -> dict[str, Any]:
    keys = [f"d{n}" for n in range(12)]
    judged = [
        judged_ranking(draw.permutation(keys).tolist(), {keys[draw.integers(12)]: 1.0, "d0": 2.0}) for _ in range(20)
    ]
    return mean_scores([each["scores"] for each in judged]) | {"judged": judged}


def of_texts(draw: np.random.Generator) -> dict[str, Any]:
    words = ["red", "the", "apple", "falls", "down"]
    texts, references = ([" ".join(draw.permutation(words)[:4]) for _ in range(12)] for _ in range(2))
    score = bleu_scores if draw.integers(2) else rouge_scores
    found, _, judged = score(texts, [(one, "a red apple") for one in references], "en")
    return found | {"judged": judged}


@pytest.mark.parametrize("scored", [of_labels, of_sets, of_numbers, of_tags, of_answers, of_rankings, of_texts])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_metric_has_an_interval_of_its_value(scored: Any, seed: int) -> None:
    scores = scored(np.random.default_rng(seed))
    labels = scores.get("report", {}).get("labels", ())
    found = intervals(scores["judged"], labels)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(
        {name: value for name, value in scores.items() if name not in WITHOUT}
    )
    assert all(interval.low <= interval.high for interval in found.values())
    assert all(each["badness"] >= 0 for each in scores["judged"])


def written(folder: Path, judged: list[dict[str, Any]]) -> tuple[str, str]:
    """report.md and report.html of a run with these predictions."""
    lines = [
        {"line": number, "true": f"true {number}", "predicted": "?", "text": f"text {number}", **each}
        for number, each in enumerate(judged, start=2)
    ]
    (folder / "predictions-valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([folder], folder / "report.html", folder / "report.md")
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def titles(markdown: str) -> list[str]:
    return [line.removeprefix("## ") for line in markdown.splitlines() if line.startswith("## ")]


CALIBRATION = """\
## Calibration, held out

Expected calibration error 0.200: how far, on average over 4 predictions, confidence is from accuracy in 10 bins of \
like confidence.

| predictions | confidence | accuracy |
| --- | --- | --- |
| 1 | 0.600 | 0.000 |
| 3 | 0.933 | 1.000 |

## Worst examples, held out

The 1 that went most wrong, the worst first, then the most confident.

| line | true | predicted | confidence | text |
| --- | --- | --- | --- | --- |
| 5 | true 5 | dog | 0.600 | text 5 |
"""


def test_a_classifier_has_all_parts(tmp_path: Path) -> None:
    said = [("cat", "cat", 0.9), ("cat", "cat", 0.95), ("dog", "dog", 0.95), ("cat", "dog", 0.6)]
    judged = [
        {
            "label": true,
            "predicted": own,
            "confidence": sure,
            "badness": float(true != own),
            "scores": {"accuracy": float(true == own)},
            "calibration": binned(sure, true == own),
        }
        for true, own, sure in said
    ]
    markdown, html = written(run_folder(tmp_path / "one"), judged)
    assert CALIBRATION in markdown
    assert [title for title in titles(markdown) if "held out" in title] == [
        "Scores, held out",
        "Leakage, held out",
        "Calibration, held out",
        "Worst examples, held out",
    ]
    parts = ("By label, held out", "confusion", "calibration")  # pictures are in the HTML alone
    assert all(f">{part}<" in html for part in parts)


def test_what_a_task_does_not_have_is_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "ranked")
    report = {"rows": 2, "ndcg_10": 0.3, "baselines": {"popularity": {"ndcg_10": 0.1}}}
    lines = [training(40, 0.5), {"step": 40, "valid_ndcg_10": 0.3, "valid_report": report}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    right = judged_ranking(["a"], {"a": 1.0})
    markdown, html = written(folder, [right, right])
    parts = ["Scores, held out", "For comparison, held out"]
    assert [title for title in titles(markdown) if "held out" in title] == parts
    assert "| the model | 0.3000 |\n| popularity | 0.1000 |" in markdown
    assert "| ndcg 10 | 1.0000 \\[1.0000, 1.0000\\] |" in markdown
    markdown, html = written(folder, [right, judged_ranking(["b", "a"], {"a": 1.0})])
    assert "| line | true | predicted | text |\n| --- | --- | --- | --- |\n| 3 | true 3 |" in markdown
    assert "By label" not in html and "Calibration" not in html


def test_tags_have_a_table_of_entities(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "tags")
    scores = tag_scores([["B-x", "O"], ["B-y"]], [["B-x", "O"], ["O"]], ["O", "B-x", "I-x", "B-y", "I-y"])
    line = {"step": 40, "valid_f1": scores["f1"], "valid_report": scores["report"]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (training(40, 0.5), line)))
    markdown, _ = written(folder, scores["judged"])
    assert "| x | 1.000 | 1.000 | 1.000 | 1 |\n| y | 0.000 | 0.000 | 0.000 | 1 |" in markdown
    assert "\n         B-x      1.000     1.000     1.000         1\n" in markdown


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
