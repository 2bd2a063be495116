"""Texts that are none of a model's labels: the threshold that is chosen, its worth, and that prediction obeys it."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from word_classifier import sentence, write_classifier

from dstrain.errors import UserError
from dstrain.predict.command import predict_command
from dstrain.predict.threshold import chosen_threshold, scope_scores, threshold_command
from dstrain.recipe.data import ClassificationData
from dstrain.tasks.examples import read_examples, reader_of


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_the_threshold_is_the_highest_that_keeps_enough(probabilities: list[float], keep: float) -> None:
    values = np.array(probabilities)
    threshold = chosen_threshold(values, keep)
    assert (values >= threshold).mean() >= keep - 1e-9
    higher = values[values > threshold]
    if len(higher):
        assert (values >= higher.min()).mean() < keep


def test_scores_of_a_threshold_are_counted_by_hand() -> None:
    inside, outside = np.array([0.9, 0.8, 0.7, 0.3]), np.array([0.75, 0.2, 0.1])
    scores = scope_scores(inside, np.array([True, True, False, False]), outside, 0.5)
    assert scores == {
        "in_scope": 4,
        "out_of_scope": 3,
        "accuracy_of_all": 0.5,
        "in_scope_kept": 0.75,
        "accuracy_of_kept": pytest.approx(2 / 3),
        "auroc": pytest.approx(10 / 12),  # of the pairs, how many are in the right order
        "out_of_scope_kept_at_95": pytest.approx(1 / 3),  # all four inside pass from 0.3 on
        "out_of_scope_rejected": pytest.approx(2 / 3),
    }
    assert "auroc" not in scope_scores(inside, np.ones(4, bool), outside[:0], 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"), ("good", "bad"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def texts(path: Path, *labels: str, first: int) -> Path:
    """A file of fifty texts of each label."""
    lines = [{"text": sentence(label, first + n), "label": label} for label in labels for n in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(folder: Path, file: Path | None, **given: Any) -> Namespace:
    keys = {"test": None, "keep": 0.95, "label_field": None, "dry_run": False, "json": True}
    return Namespace(model=str(folder), file=file and str(file), **(keys | given))


@pytest.mark.slow
def test_the_chosen_threshold_is_written_and_prediction_goes_by_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = texts(tmp_path / "held-out.jsonl", "good", "bad", first=10_000)
    test = texts(tmp_path / "test.jsonl", "good", "bad", "other", first=20_000)
    assert threshold_command(arguments(folder, held_out, test=str(test))) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held_out"]["in_scope_kept"] >= 0.95
    assert (found["test"]["in_scope"], found["test"]["out_of_scope"]) == (100, 50)
    assert found["test"]["auroc"] > 0.6
    assert json.loads((folder / "dstrain.json").read_text())["data"] == {"min_confidence": found["min_confidence"]}

    assert predict_command(Namespace(model=str(folder), file=str(test), text_field=None, batch_rows=32)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rejected = [line["label"] is None for line in lines]
    assert sum(rejected[100:]) == pytest.approx(50 * found["test"]["out_of_scope_rejected"])
    assert sum(rejected[:100]) == pytest.approx(100 * (1 - found["test"]["in_scope_kept"]))
    assert 0 < sum(rejected) < 150
    kept = [line for line in lines if line["label"] is not None]
    assert min(line["probability"] for line in kept) >= round(found["min_confidence"], 6)


def test_a_dry_run_writes_nothing_and_says_it_in_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = texts(tmp_path / "held-out.jsonl", "good", "bad", "other", first=0)
    assert threshold_command(arguments(folder, held_out, dry_run=True, json=False)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(": keeps 95% of the held-out texts in scope")
    assert out[1] == f"{held_out}: 100 texts in scope, 50 out of scope"
    assert out[3].startswith("  out of scope: ")
    assert out[-1] == "nothing was written"
    assert not (folder / "dstrain.json").exists()


def test_a_run_has_its_own_held_out_texts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "export").parent.mkdir()
    folder.rename(run / "export")
    (run / "recipe.yaml").write_text("")
    with pytest.raises(
        UserError, match=r"predictions-valid\.jsonl: no predictions of a run .*; give a FILE of held-out"
    ):
        threshold_command(arguments(run, None))
    lines = [{"label": "good", "predicted": "bad" if n < 5 else "good", "confidence": n / 100} for n in range(100)]
    (run / "predictions-valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert threshold_command(arguments(run, None)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["min_confidence"] == 0.05
    assert found["held_out"] == {
        "in_scope": 100,
        "out_of_scope": 0,
        "accuracy_of_all": 0.95,
        "in_scope_kept": 0.95,
        "accuracy_of_kept": 1.0,
    }


def test_what_cannot_choose_a_threshold_is_refused(folder: Path, tmp_path: Path) -> None:
    held_out = texts(tmp_path / "held-out.jsonl", "good", first=0)
    with pytest.raises(UserError, match=r"--keep 1\.5: is the share"):
        threshold_command(arguments(folder, held_out, keep=1.5))
    with pytest.raises(UserError, match=r"other\.jsonl: no text has one of the model's labels"):
        threshold_command(arguments(folder, texts(tmp_path / "other.jsonl", "other", first=0)))
    with pytest.raises(UserError, match=r"held-out\.jsonl:1: has no field 'intent'; add it, or give --label-field"):
        threshold_command(arguments(folder, held_out, label_field="intent"))


def test_left_out_labels_are_in_no_split_and_counted(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.csv").write_text("text,label\none,a\ntwo,b\nthree,c\nfour,a\n")
    section = ClassificationData(
        train=str(tmp_path / "train.csv"),
        valid=str(tmp_path / "valid.csv"),
        left_out_labels=("b",),
        sequence_length=16,
    )
    reader = reader_of(section)
    labels, splits = read_examples(section, reader)
    assert labels == ["a", "c"]
    assert [one.text for one in splits.train] == ["one", "three", "four"] == [one.text for one in splits.valid]
    assert reader.facts["dropped_from_train"] == {"label is one of data.left_out_labels": 1}
