from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recipe_support import VALID

import dstrain.recipe
from dstrain.recipe.json_schema import recipe_schema, schema_text
from dstrain.recipe.source import Place, parse_yaml, read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def plain(text: str) -> Any:
    return parse_yaml(text, Place("r.yaml", 1))[0].plain()


def test_the_committed_schema_is_current() -> None:
    committed = Path(dstrain.recipe.__file__).with_name("recipe.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run: dstrain recipe schema > dstrain/recipe/recipe.schema.json"


@pytest.mark.slow
def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits(path: Path) -> None:
    VALIDATOR.validate(read_yaml(str(path))[0].plain())


@pytest.mark.parametrize(
    "text",
    [
        VALID,
        "base: other.yaml\n",
        "base: other.yaml\nmodel: {pretrained: x}\ndata: {lanes: null}\non_nan: null\n",
        VALID + "checkpoint: {async: false}\n",
        VALID + "log: null\n",
        VALID.replace(
            "train: shards", "sources: {a: {shards: x, weight: 2}, b: null}\n  masking: {rate: {from: 0.3, to: 0.2}}"
        ),
        VALID + "phases: [{steps: 3, data: {sources: {a: 1}, masking: {rate: 0.2}}, schedule: null}, {tokens: 9}]\n",
    ],
)
def test_what_fits(text: str) -> None:
    VALIDATOR.validate(plain(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lanes: 64", "lane: 64"),
        ("lanes: 64", "lanes: 6.5"),
        ("lanes: 64", "lanes: '64'"),
        ("lanes: 64", "lanes: 0"),
        ("architecture: bert", "architecture: gpt"),
        ("architecture: bert\n", "pretrained: null\n"),
        ("  sequence_length: 128\n", ""),
        ("  train: shards", "  sources: {a: {weight: many}}"),
        ("  train: shards", "  sources: {a: {shard: x}}"),
        ("  train: shards", "  sources: {a.b: {shards: x}}"),
        ("steps: 100", "steps: 100\nphases: [{step: 3}]"),
        ("steps: 100", "steps: 100\nphases: [{schedule: {name: plateau}}]"),
        ("steps: 100", "steps: 100\nphases: {steps: 3}"),
        ("lanes: 64", "masking: {rate: {from: 0.3, until: 0.1}}"),
        ("name: example\n", ""),
        ("name: example", "name: a/b"),
        ("hidden_size: 128", "norm_bias: true"),
        ("steps: 100", "steps: 100\ncheckpoint: {async_: false}"),
        ("steps: 100", "steps: 100\n  precision: no"),
    ],
)
def test_what_does_not_fit(old: str, new: str) -> None:
    assert old in VALID
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(plain(VALID.replace(old, new)))
