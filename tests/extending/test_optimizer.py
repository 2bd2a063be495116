"""An optimizer in one file of another package: planned, trained, resumed on other ranks, exported; or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from extension_package import Extension, InstallExtension, documented_file

from dstrain.checkpoint.manifest import Manifest
from dstrain.recipe.schema import Recipe

pytestmark = pytest.mark.ranks

# As the documented one, but for a factored state.
FACTORED = """\
from typing import Any, Literal
from dstrain.optimizers import Optimizer, OptimizerSection

class Section(OptimizerSection):
    name: Literal["factored"]

class Factored(Optimizer):
    section = Section
    states = ()
    whole = "factored second moments"

    def torch_class(self) -> Any:
        import torch
        return torch.optim.Adafactor

    def arguments(self, section: Section) -> dict[str, Any]:
        return {}

OPTIMIZER = Factored()
"""


@pytest.fixture(scope="module")
def extension(install_extension: InstallExtension) -> Extension:
    return install_extension(
        {"dstrain_lion": documented_file("dstrain_lion.py"), "factored": FACTORED, "broken": "import no_such_module"},
        {
            "dstrain.optimizers": {
                "lion": "dstrain_lion:OPTIMIZER",
                "factored": "factored:OPTIMIZER",
                "broken": "broken:OPTIMIZER",
                "renamed": "factored:OPTIMIZER",
            }
        },
    )


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe().model_dump(mode="json", by_alias=True, exclude_unset=True)))
    return path


def optimizer(name: str) -> str:
    return f"optimizer={{name: {name}, learning_rate: 1e-3}}"


def test_a_plan_counts_its_states(extension: Extension, recipe: Path) -> None:
    plans = {
        name: json.loads(extension.dstrain("plan", str(recipe), optimizer(name), "--json"))
        for name in ("adamw", "lion", "sgd")
    }
    assert plans["lion"]["checkpoint_bytes"] == plans["sgd"]["checkpoint_bytes"]
    assert plans["lion"]["checkpoint_bytes"] * 3 == plans["adamw"]["checkpoint_bytes"] * 2


@pytest.mark.parametrize("stages", [(1, 3), (3, 0)])
def test_it_trains_resumes_elsewhere_and_is_exported(
    extension: Extension, recipe: Path, tmp_path: Path, stages: tuple[int, int]
) -> None:
    keys = [optimizer("lion"), "checkpoint.every_steps=4", "schedule.warmup_steps=1"]
    for (stage, ranks), steps in zip(((stages[0], 2), (stages[1], 3)), (4, 8), strict=True):
        options = [f"train.zero.stage={stage}", f"train.steps={steps}", "--procs-per-node", str(ranks)]
        extension.dstrain("run", str(recipe), *keys, *options, "--run-dir", str(tmp_path / "run"))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 9))
    manifest = tmp_path / "run" / "checkpoints" / "step-0000000008" / "manifest.json"
    states = {tuple(about["states"]) for about in Manifest.read(manifest.parent).parameters.values()}
    assert states == {("weight", "momentum")}
    extension.dstrain("ckpt", "verify", str(manifest.parent))
    extension.dstrain("export", str(tmp_path / "run"), "--out", str(tmp_path / "exported"))


def test_one_that_needs_whole_parameters_is_refused_where_they_are_cut(extension: Extension, recipe: Path) -> None:
    output = extension.dstrain("plan", str(recipe), optimizer("factored"), "train.zero.stage=1", exit_code=2)
    assert "optimizer.name=factored needs whole parameters (factored second moments), and train.zero.stage=1" in output
    assert "use stage 0, or one of adamw, lion, sgd" in output
    extension.dstrain("plan", str(recipe), optimizer("factored"))


def test_an_unknown_one_is_refused_with_those_that_are_there(extension: Extension, recipe: Path) -> None:
    output = extension.dstrain("plan", str(recipe), optimizer("lino"), exit_code=2)
    assert "optimizer.name=lino is not one of adamw, factored, lion, sgd; use lion" in output


def test_broken_ones_are_refused_only_where_a_recipe_names_them(extension: Extension, recipe: Path) -> None:
    extension.dstrain("plan", str(recipe))
    output = extension.dstrain("plan", str(recipe), optimizer("broken"), exit_code=2)
    assert "optimizer broken cannot be imported" in output and "Traceback" not in output
    output = extension.dstrain("plan", str(recipe), optimizer("renamed"), exit_code=2)
    assert "optimizer renamed: `name` of Section allows factored; make it" in output
