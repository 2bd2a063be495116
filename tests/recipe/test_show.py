import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_support import VALID, write

from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.recipe.show import resolved_yaml, resume_differences, show_json, show_text


def load(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder), overrides, check_files=False).recipe


paths = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1).map(
    lambda text: f"/{text.strip('/')}x"
)


PHASES: list[dict[str, Any]] = [
    {"steps": 3},
    {"tokens": 7, "data": {"sequence_length": 7, "masking": {"rate": {"from": 0.3, "to": 0.1}}}},
    {"steps": 9, "train": {"micro_batch_rows": 3}, "schedule": {"warmup_steps": None, "name": "polynomial"}},
]


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Return the values of a valid recipe whose texts and numbers are as odd as they may be."""
    lanes, micro = draw(st.integers(1, 64)), draw(st.integers(1, 8))
    phases = draw(st.lists(st.sampled_from(PHASES), max_size=3))
    length = draw(st.sampled_from([{"steps": 10}, {"tokens": 1}, {"epochs": draw(st.floats(1e-300, 1e300))}]))
    return {
        "name": draw(st.sampled_from(["a", "1", "1e5", "null", "true", "3.5", "no", "0x1", "1_0"])),
        "task": "masked_lm",
        "model": draw(st.sampled_from([{"config": {}}, {"pretrained": "/m"}]))
        | {"architecture": draw(st.sampled_from(["bert", "roberta", "modernbert"]))},
        "tokenizer": draw(paths),
        "data": {"train": draw(paths), "sequence_length": 8, "lanes": lanes, "text_field": draw(st.text(min_size=1))},
        "train": {
            "global_batch_rows": lanes * micro * 3,
            "micro_batch_rows": micro,
            "clip_grad_norm": draw(st.none() | st.floats(1e-300, 1e300)),
        }
        | ({} if phases else length),
        "phases": phases,
        "optimizer": {"name": "adamw", "learning_rate": draw(st.floats(1e-300, 1e300))},
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(values=recipes())
def test_the_resolved_recipe_loads_to_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = MaskedLmRecipe.model_validate_json(json.dumps(values), by_alias=True, by_name=False)
    recipe = recipe.model_copy(
        update={
            "tokenizer": str(Path(recipe.tokenizer)),
            "data": recipe.data.model_copy(update={"train": str(Path(recipe.data.train))}),
        }
    )
    again = load_recipe(write(tmp_path, resolved_yaml(recipe)), check_files=False).recipe
    assert again == recipe


def test_sources_and_phases_are_written_as_sections(tmp_path: Path) -> None:
    sources = "data.sources={web: {shards: /web}, 1e5: {shards: /no, weight: 0, when_exhausted: stop}}"
    phases = (
        "phases=[{steps: 3}, {name: long, steps: 2, data: {sources: {1e5: 1}, masking: {rate: {from: 0.3, to: 0.1}}}}]"
    )
    recipe = load(tmp_path, "data.train=null", "train.steps=null", sources, phases)
    text = resolved_yaml(recipe)
    assert (
        '  sources:\n    web:\n      shards: /web\n      weight: 1.0\n      when_exhausted: repeat\n    "1e5":\n'
        in text
    )
    assert "phases:\n- steps: 3\n" in text and "- name: long\n  steps: 2\n" in text
    assert load_recipe(write(tmp_path, text), check_files=False).recipe == recipe


def test_the_resolved_recipe_is_complete_and_in_reading_order(tmp_path: Path) -> None:
    text = resolved_yaml(load(tmp_path, "train.clip_grad_norm=null"))
    assert text.startswith(
        "name: example\ntask: masked_lm\nmodel:\n  architecture: bert\n  config:\n    vocab_size: 30522\n"
    )
    assert "  clip_grad_norm: null\n" in text
    assert "betas: [0.9, 0.999]\n" in text
    assert "\n  tokens:" not in text


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_rows=8",
        "train.zero.stage=3",
        "train.precision=fp32",
        "train.steps=7",
        "train.seed=1",
        "optimizer.learning_rate=1",
        "schedule.warmup_steps=3",
        "checkpoint.every_steps=1",
        "log.every_steps=1",
        "evaluate.batches=1",
        "model.activation_checkpointing=true",
        "data.valid=x",
        "data.train=/other",
        "tokenizer=/other",
        "data.prefetch_steps=0",
        "data.on_bad_sample=skip",
        "name=other",
    ],
)
def test_what_may_change_on_resume(tmp_path: Path, override: str) -> None:
    assert resume_differences(load(tmp_path), load(tmp_path, override)) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.config.num_hidden_layers=1", "model.config.num_hidden_layers: 12 → 1"),
        ("model.frozen_layers=1", "model.frozen_layers: 0 → 1"),
        ("checkpoint.storage=s3://a/b", "checkpoint.storage: null → s3://a/b"),
    ],
)
def test_what_may_not_change_on_resume(tmp_path: Path, override: str, difference: str) -> None:
    assert [str(found) for found in resume_differences(load(tmp_path), load(tmp_path, override))] == [difference]


def test_each_value_is_shown_with_its_origin(tmp_path: Path) -> None:
    write(tmp_path, VALID, "base.yaml")
    loaded = load_recipe(write(tmp_path, "base: base.yaml\nname: child\n"), ["train.zero.stage=2"], check_files=False)
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in show_text(loaded).splitlines()}
    assert lines["name"] == ["child", f"{tmp_path}/recipe.yaml:2"]
    assert lines["data.lanes"] == ["64", f"{tmp_path}/base.yaml:10"]
    assert lines["train.zero.stage"] == ["2", "command line"]
    assert lines["data.seed"] == ["0", "default"]
    rows = json.loads(show_json(loaded))
    assert {"key": "train.zero.stage", "value": 2, "origin": "command line"} in rows
    assert [row["key"] for row in rows] == list(lines)
