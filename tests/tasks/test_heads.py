"""Every head, trained for real in one process: resumed exactly, its parameters as planned, exported as it was."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled import write_examples
from ranks import run_ranks
from safetensors.numpy import load_file
from training import model_weights, training

from dstrain.cli import main
from dstrain.plan.text import make_plan
from dstrain.predict.items import read_items
from dstrain.predict.load_predictor import load_predictor
from dstrain.recipe.definition import definition_of
from dstrain.recipe.load import load_recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.report.intervals import intervals
from dstrain.report.page import read_predictions
from dstrain.tasks.answer_scores import exact
from dstrain.tasks.calibration import calibration
from dstrain.tasks.writing_scores import rouge_scores
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.reporting import Reporter

pytestmark = pytest.mark.ranks

RECIPE = """
name: tiny
model: {{architecture: {architecture}, config: {{vocab_size: 128, hidden_size: 16, num_hidden_layers: 2,
  num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 40}}}}
tokenizer: {folder}/tokenizer
data: {{{data}, sequence_length: 16, seed: 3}}
train: {{global_batch_rows: 4, micro_batch_rows: 2, steps: 6, precision: fp32}}
optimizer: {{learning_rate: 1e-2}}
schedule: {{name: constant}}
checkpoint: {{every_steps: 3}}
log: {{tensorboard: false, every_steps: 1}}
task: {task}
"""
SENTENCE = "the red apple of the blue sky"
RECORDS: dict[str, dict[str, Any]] = {
    "pairs": {"text": SENTENCE, "pair": "green leaf " * 9, "label": 1.5},
    "sets": {"text": SENTENCE, "label": ["red", "blue"]},
    "tags": {
        "tokens": SENTENCE.split() * 3,
        "tags": ["O", "B-colour", "I-colour", "O", "O", "B-colour", "B-thing"] * 3,
    },
}
RECORDS["answers"] = {
    "question": "which colour is the leaf",
    "context": SENTENCE * 3,
    "answers": [{"text": "red apple", "answer_start": 4}],
}
RECORDS["sentences"] = {
    "text": ["red apple", "blue sky", "green leaf", "the sky " * 8, "leaf", "blue"],
    "summary": ["the green leaf of the apple", "the blue sky"],
}
HEADS = {
    "answers": ("roberta", "question_answering", "stride: 2, question_length: 4, unanswerable: true, n_best: 3"),
    "pairs": ("bert", "sequence_classification", "pair_field: pair, target: number"),
    "sets": ("roberta", "sequence_classification", "target: labels, labels: [red, blue, green]"),
    "sentences": ("bert", "sentence_extraction", "source_field: text, target_field: summary, sentences: 2"),
    "tags": ("modernbert", "token_classification", "stride: 4, labels: [colour, thing]"),
}
METRICS = {
    "answers": ("loss", "exact_match", "f1", "answerable_f1", "unanswerable_f1"),
    "pairs": ("loss", "pearson", "mean_squared_error"),
    "sentences": ("loss", "rouge1", "rouge2", "rougeL", "baseline_rouge1"),
    "sets": ("loss", "micro_f1", "auroc"),
    "tags": ("loss", "precision", "recall", "f1", "token_accuracy"),
}

PREDICTIONS = {"answers": 5, "pairs": 0, "sentences": 0, "sets": 5 * 3, "tags": 5 * 21 - 10}  # that are calibrated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("heads"))


def write_recipe(folder: Path, name: str) -> Path:
    """Six examples of a head, and a recipe for it."""
    architecture, task, keys = HEADS[name]
    for split, lines in (("train", 6), ("valid", 5)):
        records = [varied(RECORDS[name], number) for number in range(lines)]
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if name == "tags":
        (folder / "tags-test.jsonl").write_text(json.dumps({"tokens": ["sky"], "tags": ["B-thing"]}) + "\n")
        keys += f", test: {folder}/tags-test.jsonl"
    files = f"train: {folder}/{name}-train.jsonl, valid: {folder}/{name}-valid.jsonl"
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(folder=folder, task=task, architecture=architecture, data=f"{files}, {keys}"))
    return path


def varied(record: dict[str, Any], number: int) -> dict[str, Any]:
    """An example that differs from the one before it, in length and in what it is to be taken for."""
    if "tokens" in record:
        return {name: values[number:] for name, values in record.items()}
    if "answers" in record:
        question = record["question"][: 6 + number]
        return record | {"question": question, "answers": record["answers"] if number % 2 else []}
    if "summary" in record:
        return {"text": record["text"][number % 3 :], "summary": record["summary"][number % 2]}
    label = record["label"]
    return record | {
        "text": " ".join(record["text"].split()[number:]),
        "label": label[number % 2 :] if isinstance(label, list) else label * number,
    }


OVERRIDES = {
    "sets": ["model.frozen_layers=1", "optimizer.layer_decay=0.5", "train.zero.stage=2"],
    "stopped": [
        "checkpoint.keep_last=1",
        "evaluate.every_steps=1",
        "early_stopping={metric: loss, direction: maximize, patience: 2}",  # the first evaluation is the best by that
    ],
}


def live(
    rank: int, world: int, recipe_file: Path, run_dir: Path, steps: list[int], overrides: list[str]
) -> list[dict[str, Any]]:
    """Start a run once for each number of steps, to stop after it, and tell its weights each time."""
    found = []
    for target in steps:
        recipe = load_recipe(recipe_file, [f"train.steps={target}", *overrides]).recipe
        run_dir.mkdir(exist_ok=True)
        (run_dir / "recipe.yaml").write_text(resolved_yaml(recipe))
        with training(recipe) as (runtime, task), Reporter(runtime, recipe, run_dir, 1, target) as report:
            assert Loop(runtime, task, run_dir, report, StopRequest()).run() == "done"
            found.append({name: value.tolist() for name, value in model_weights(runtime, task).items()})
    return found


def rescored(name: str, records: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of what `dstrain predict` said: those of the evaluation, if it is the same model on the same rows."""
    pairs = list(zip(records, predicted, strict=True))
    if name == "pairs":
        return {"mean_squared_error": float(np.mean([(one["label"] - said["number"]) ** 2 for one, said in pairs]))}
    if name == "sets":
        chosen = [{each["label"] for each in said["labels"]} for said in predicted]
        return {
            "accuracy": float(np.mean([set(one["label"]) == own for one, own in zip(records, chosen, strict=True)]))
        }
    if name == "sentences":
        assert all(0 < len(said["numbers"]) <= 2 and said["numbers"] == sorted(said["numbers"]) for said in predicted)
        texts = [" ".join(one["text"][number] for number in said["numbers"]) for one, said in pairs]
        assert texts == [said["summary"] for said in predicted]
        return rouge_scores(texts, [(one["summary"],) for one in records], "en")[0]
    if name == "tags":
        right = [tag == own for one, said in pairs for tag, own in zip(one["tags"], said["tags"], strict=True)]
        return {"token_accuracy": float(np.mean(right))}
    true = [one["answers"][0]["text"] if one["answers"] else "" for one in records]
    assert all(len(said["n_best"]) == 3 for said in predicted)
    same = [exact(said["answer"], answer, "en") for said, answer in zip(predicted, true, strict=True)]
    return {"exact_match": float(np.mean(same))}


def measured(evaluation: dict[str, Any]) -> set[str]:
    """The metrics that an evaluation has of the model; those of what it is compared with are nothing to choose by."""
    numbers = {name.removeprefix("valid_") for name, value in evaluation.items() if isinstance(value, int | float)}
    return {
        name for name in numbers if name != "step" and not name.startswith(("baseline_", "popularity_", "as_given_"))
    }


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def answered_in_threads(run_dir: Path, file: Path) -> bool:
    """Whether four threads that ask a model at the same time get what one gets that asks alone."""
    predictor = load_predictor(run_dir / "export")
    with file.open("rb") as stream:
        items = list(read_items(stream, file.name, predictor.fields, predictor.tokens_field))
    values = [item.values for item in items] * 4
    alone = predictor.answers(values, 4)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: predictor.answers(values, 4), range(8)))
    return together == [alone] * 8


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_planned_resumed_and_exported_exactly(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(folder, name)
    overrides = OVERRIDES.get(name, [])
    ((whole,),) = run_ranks(1, live, path, folder / f"{name}-whole", [6], overrides)
    ((half, resumed),) = run_ranks(1, live, path, folder / f"{name}-parts", [3, 6], overrides)
    assert whole == resumed
    still = {key for key in whole if half[key] == whole[key]}
    assert ("roberta.encoder.layer.0.output.dense.weight" in still) == (name == "sets")
    assert not [key for key in still if ".layer.1." in key and ".weight" in key]
    ledgers = [(folder / f"{name}-{run}" / "ledger.jsonl").read_text() for run in ("whole", "parts")]
    assert ledgers[0] == ledgers[1]
    plan = make_plan(load_recipe(path).recipe, 1, None)
    assert plan.total_parameters == sum(int(np.size(value)) for value in whole.values())
    assert main(["ckpt", "export", str(folder / f"{name}-whole")]) == 0
    capsys.readouterr()
    evaluation = next(line for line in reversed(logged(folder / f"{name}-whole")) if "valid_loss" in line)
    assert evaluation["step"] == 6
    assert {f"valid_{metric}" for metric in METRICS[name]} <= evaluation.keys()
    assert measured(evaluation) <= definition_of(HEADS[name][1]).measures.keys()
    assert evaluation["valid_report"]["rows"] == 5
    judged = read_predictions(folder / f"{name}-whole", "valid")
    scores = intervals(judged, evaluation["valid_report"].get("labels", ()))
    assert {f"valid_{key}": found.value for key, found in scores.items()} == pytest.approx(
        {f"valid_{key}": evaluation[f"valid_{key}"] for key in measured(evaluation) - {"loss"}}
    )
    assert sum(each.predictions for each in calibration(judged)[0]) == PREDICTIONS[name]
    test = folder / f"{name}-whole" / "test.json"
    assert test.exists() == (name == "tags")
    if name == "tags":
        scores = json.loads(test.read_text())
        assert (scores["last_step"], scores["step"], scores["report"]["rows"]) == (6, 6, 1)
    assert main(["report", str(folder / f"{name}-whole"), str(folder / f"{name}-parts")]) == 0
    assert main(["report", str(folder / f"{name}-whole")]) == 0
    shown = capsys.readouterr().out
    assert all(f"held-out {metric}" in shown for metric in METRICS[name])
    assert ("test token_accuracy" in shown) == (name == "tags")
    records = [json.loads(line) for line in (folder / f"{name}-valid.jsonl").read_text().splitlines()]
    assert (
        main(["predict", str(folder / f"{name}-whole"), str(folder / f"{name}-valid.jsonl"), "--batch-rows", "2"]) == 0
    )
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(predicted) == 5
    for metric, value in rescored(name, records, predicted).items():
        assert value == pytest.approx(evaluation[f"valid_{metric}"], abs=1e-5), metric
    assert answered_in_threads(folder / f"{name}-whole", folder / f"{name}-valid.jsonl"), "as `dstrain serve` does"


def evaluated(rank: int, world: int, recipe_files: list[Path]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """What the weights of the beginning score and say: the same weights on any number of ranks."""
    found = []
    for recipe_file in recipe_files:
        with training(load_recipe(recipe_file).recipe) as (runtime, task):
            runtime.engine.eval()
            with torch.no_grad():
                scores = task.evaluate(runtime, runtime.engine)
            found.append((scores, task.predictions()["valid"]))
    return found


def test_evaluation_does_not_depend_on_ranks_to_the_last_bit(folder: Path) -> None:
    paths = [write_recipe(folder, name) for name in ("tags", "answers")]
    (alone,) = run_ranks(1, evaluated, paths)
    assert all(each["calibration"] for _, judged in alone for each in judged)
    for shared in run_ranks(2, evaluated, paths):
        for (scores, said), (others, also_said) in zip(alone, shared, strict=True):
            assert also_said == said
            assert others.pop("loss") == pytest.approx(scores["loss"], rel=1e-12)  # added up in another order
            assert others == {name: value for name, value in scores.items() if name != "loss"}


def test_a_run_stops_early_and_ends_with_its_best_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run_dir = write_recipe(folder, "pairs"), folder / "stopped"
    ((first, again),) = run_ranks(1, live, path, run_dir, [6, 6], OVERRIDES["stopped"])
    evaluated = [line["step"] for line in logged(run_dir) if "valid_loss" in line]
    assert evaluated == [1, 2, 3], "started again it is done already"
    losses = [line["valid_loss"] for line in logged(run_dir) if "valid_loss" in line]
    assert losses[0] > max(losses[1:])
    kept = sorted(folder.name for folder in (run_dir / "checkpoints").glob("step-*"))
    assert kept == ["step-0000000001", "step-0000000003"]
    assert main(["ckpt", "export", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "step-0000000001 had the best evaluation (early_stopping); --step 3 takes the newest" in said
    exported = load_file(run_dir / "export" / "model.safetensors")
    assert first == again
    assert all(np.array_equal(exported[name.removeprefix("model.")], value) for name, value in first.items())
