"""An objective and a fine-tuning task of another package, from the recipe to the predictions."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from extension_package import Extension, InstallExtension, documented_file
from transformers import AutoModelForTokenClassification

from dstrain.recipe.schema import Recipe

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def extension(install_extension: InstallExtension) -> Extension:
    return install_extension(
        {name: documented_file(f"{name}.py") for name in ("replaced_tokens", "ratings")},
        {
            "dstrain.objectives": {"replaced_tokens": "replaced_tokens:OBJECTIVE"},
            "dstrain.tasks": {"ratings": "ratings:TASK"},
        },
    )


def write(folder: Path, recipe: Recipe, task: str, **sections: object) -> str:
    values = (
        recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        | {"task": task, "schedule": {"name": "constant"}}
        | sections
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def logged(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def train_on_changing_ranks(extension: Extension, recipe: str, run: Path) -> None:
    """Two steps on two ranks, two more on one."""
    extension.dstrain("run", recipe, "train.steps=2", "--procs-per-node", "2", "--run-dir", str(run))
    extension.dstrain("run", recipe, "train.steps=4", "--procs-per-node", "1", "--run-dir", str(run))
    assert len(logged(run, "loss")) == 4


def test_an_objective_of_two_models(extension: Extension, tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = write(
        tmp_path,
        tiny_recipe(),
        "replaced_tokens",
        evaluate={"every_steps": 2, "batches": 2},
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert "ranks" in extension.dstrain("plan", recipe, "--world", "2")
    train_on_changing_ranks(extension, recipe, run)
    extension.dstrain("run", recipe, "train.steps=4", "--procs-per-node", "1", "--run-dir", str(whole))
    assert logged(run, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    (loss, *_), (masked, *_), (replaced, *_) = (
        logged(run, name) for name in ("loss", "valid_loss", "valid_replaced_loss")
    )
    assert loss > masked + 10 * replaced, "the second term weighs 50 times as much"
    extension.dstrain("ckpt", "export", str(run))
    exported = AutoModelForTokenClassification.from_pretrained(run / "export", local_files_only=True)
    assert exported.config.id2label == {0: "replaced"}
    mistaken = extension.dstrain("plan", recipe, "task=replaced_token", exit_code=2)
    assert re.search("task=replaced_token is not one of masked_lm, replaced_tokens, .*ratings", mistaken)


def test_a_task_on_examples(extension: Extension, tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    examples = [{"text": "so " * number + "good", "label": 1 + number % 5} for number in range(40)]
    file = tmp_path / "reviews.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    recipe = write(
        tmp_path,
        tiny_recipe(),
        "ratings",
        data={"train": str(file), "validation_split": 8, "sequence_length": 32},
        evaluate={"every_steps": 2},
        early_stopping={"metric": "stars_off", "direction": "minimize"},
    )
    run = tmp_path / "run"
    extension.dstrain("run", recipe, "--dry-run", "--procs-per-node", "2", "--run-dir", str(run))
    extension.dstrain("doctor", recipe, "--quick", "--procs-per-node", "2", "--run-dir", str(run))
    train_on_changing_ranks(extension, recipe, run)
    assert len(logged(run, "valid_stars_off")) >= 2
    extension.dstrain("ckpt", "export", str(run))
    texts = tmp_path / "texts.txt"
    texts.write_text("so so good\n")
    predicted = extension.dstrain("predict", str(run), str(texts))
    assert 1 <= json.loads(predicted.strip().splitlines()[-1])["stars"] <= 5
    assert "early_stopping.metric=rouge1 is nothing that evaluations of ratings measure" in extension.dstrain(
        "plan", recipe, "early_stopping.metric=rouge1", exit_code=2
    )
