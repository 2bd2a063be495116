"""The report: what a resume undid is left out, and the text is compared whole."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dstrain.diagnose.failure import RankFailure
from dstrain.diagnose.verdict import Verdict
from dstrain.errors import UserError
from dstrain.report.command import report_command
from dstrain.report.page import read_predictions
from dstrain.report.runs import read_metrics, scores_in_words, summarize_run

RECIPE = """
name: {name}
task: sequence_classification
model: {{architecture: bert, config: {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}}}}
tokenizer: tokenizer
data: {{train: data/train.csv, valid: /data/valid.csv, sequence_length: 128}}
train: {{global_batch_rows: 32, micro_batch_rows: 16, steps: 40, precision: bf16, zero: {{stage: 2}}}}
optimizer: {{learning_rate: 3e-4}}
"""

ONE = """\
run                 one
task                sequence_classification
model               bert, 2 layers × 64, 4 heads
weights             random, seed 0
data                data/train.csv
global batch        32 rows × 128 tokens
optimizer           adamw, 0.0003 linear
numerics            bf16, ZeRO-2
ranks               2
attempts            2 (1 failed)
steps               40 of 40
tokens              40,000
tokens/s (median)   1,020
waited for data     10.0 %
goodput             81.2 %
newest checkpoint   40
training loss       2.0000 → 0.5000
best training loss  0.4000
held out, at step   40
held-out loss       0.6000
held-out accuracy   0.7500
held-out macro_f1   0.7333
one: attempt 1: rank 1 on node7 killed by SIGKILL

label           precision  recall     f1  rows
cat                 1.000   0.500  0.667     2
dog                 0.667   1.000  0.800     2
mean of labels      0.833   0.750  0.733     4
1 of the texts are in the training file too: the scores flatter

true ↓  predicted →  cat  dog
cat                    1    1
dog                    0    2
"""

BY_LABEL = """\
F1 by label    one    two
cat          0.667  0.667
dog          0.800  0.800
macro F1     0.733  0.733
accuracy     0.750  0.750
"""


def training(step: int, loss: float) -> dict[str, Any]:
    speed = {"tokens_per_second": 990 + step, "data_wait_share": 0.1, "goodput": 0.812}
    return {"step": step, "loss": loss, "tokens": step * 1000, **speed}


def evaluation(step: int) -> dict[str, Any]:
    report = {
        "accuracy": 0.75,
        "macro_f1": 0.7333,
        "rows": 4,
        "labels": {
            "cat": {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "rows": 2},
            "dog": {"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "rows": 2},
        },
        "confusion": [[1, 1], [0, 2]],
        "texts_also_in_train": 1,
    }
    return {"step": step, "valid_loss": 0.6, "valid_accuracy": 0.75, "valid_macro_f1": 0.7333, "valid_report": report}


def run_folder(folder: Path) -> Path:
    (folder / "attempts" / "0001").mkdir(parents=True)
    (folder / "attempts" / "0002").mkdir()
    (folder / "status").mkdir()
    (folder / "checkpoints" / "step-0000000040").mkdir(parents=True)
    (folder / "checkpoints" / "step-0000000040" / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "step-0000000050").mkdir()  # never committed
    (folder / "recipe.yaml").write_text(RECIPE.format(name=folder.name))
    killed = RankFailure(rank=1, host="node7", exit_code=-9, time_unix=1.0)
    verdict = Verdict(1, killed, (), cause="", remedy="", decision="restart", reason="")
    (folder / "attempts" / "0001" / "verdict.json").write_text(json.dumps(verdict.as_json()))
    (folder / "status" / "node7.json").write_text(json.dumps({"world_size": 2, "total_steps": 40}))
    lines = [
        training(1, 2.0),
        training(20, 0.4),
        training(30, 0.1),
        evaluation(30),
        training(30, 0.7),  # resumed from step 20
        evaluation(30),
        training(40, 0.5),
        evaluation(40),
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(content + '{"step": 4')
    return folder


def test_what_a_resume_or_a_rollback_undid_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        *(training(step, float(step)) for step in (1, 10, 20, 30)),
        evaluation(30),
        training(20, 0.2),
        training(30, 0.3),
        evaluation(30),
        {"step": 35, "rolled_back_to": 20},
        training(30, 0.4),
        {"step": 31, "skipped": True},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = read_metrics(path)
    assert [(entry["step"], entry["loss"]) for entry in metrics.training] == [
        (1, 1.0),
        (10, 10.0),
        (20, 0.2),
        (30, 0.4),
    ]
    assert metrics.evaluations == []


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: damaged line"):
        read_metrics(path)


def test_one_run_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run_folder(tmp_path / "one").parent)
    assert report_command(Namespace(runs=["one"], json=False, html=None, md=None)) == 0
    assert capsys.readouterr().out == ONE


def test_two_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_folder(tmp_path / "one").parent)
    run_folder(tmp_path / "two")
    report_command(Namespace(runs=["one", "two"], json=False, html=None, md=None))
    table, _, by_label = capsys.readouterr().out.partition("\n\n")
    assert table.splitlines()[0].split() == ["run", "one", "two"]
    assert "held-out accuracy   0.7500                        0.7500" in table
    assert "two: attempt 1: rank 1 on node7 killed by SIGKILL" in table
    assert by_label == BY_LABEL


def test_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_command(Namespace(runs=[str(run_folder(tmp_path / "one"))], json=True, html=None, md=None))
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["step"], run["loss_best"], run["evaluation"]["macro_f1"]) == (40, 0.4, 0.7333)
    assert run["classification"]["confusion"] == [[1, 1], [0, 2]]


def test_the_end_of_a_run_says_what_it_reached(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "one")
    assert scores_in_words(folder) == ["held out: loss 0.600, accuracy 0.750, macro_f1 0.733"]
    (folder / "test.json").write_text(json.dumps({"step": 40, "accuracy": 0.7}))
    (folder / "report.html").touch()
    assert scores_in_words(folder)[1:] == ["test set: accuracy 0.700", f"report: {folder}/report.html"]
    assert scores_in_words(tmp_path) == []


def test_a_text_may_hold_any_line_end(tmp_path: Path) -> None:
    judged = [{"text": "one\u0085two\u2028three"}, {"text": "four"}]
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in judged]
    (tmp_path / "predictions-valid.jsonl").write_text("".join(lines), encoding="utf-8")
    assert read_predictions(tmp_path, "valid") == judged


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(name="new"))
    summary = summarize_run(tmp_path)
    assert (summary.step, summary.loss_last, summary.evaluation, summary.attempts) == (0, None, {}, 0)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run's folder: it has no recipe\.yaml"):
        summarize_run(tmp_path)


def test_reporting_does_not_import_torch() -> None:
    program = "import sys, dstrain.report.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
