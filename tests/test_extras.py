"""What works where only the core is installed, and what is said where an extra is missing.

The packages of the extras are hidden from the processes that a test starts, as if they were not installed.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from dstrain.base import extras
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.slow

HIDE = """
import importlib.machinery

HIDDEN = {hidden!r}
find = importlib.machinery.PathFinder.find_spec


def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else find(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_others)
"""
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def core_alone(tmp_path: Path) -> Command:
    """Runs `dstrain …` in an interpreter that has no package of any extra."""
    folder = tmp_path / "hiding"
    folder.mkdir()
    hidden = sorted({module for modules in extras.EXTRAS.values() for module in modules} - {"jinja2"})  # torch's, too
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dstrain", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})

    return run


def test_pretraining_needs_no_extra(core_alone: Command, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(
        resolved_yaml(tiny_recipe("train.steps=4", "schedule.warmup_steps=1", "checkpoint.every_steps=2"))
    )
    for steps in (4, 6):  # once more: it resumes
        trained = core_alone("run", str(recipe), f"train.steps={steps}", "--run-dir", str(run_dir))
        assert trained.returncode == 0, trained.stderr + trained.stdout
    (log,) = (run_dir / "attempts" / "0002" / "logs").glob("*/rank-00000.log")
    assert "pip install 'dstrain[report]'" in log.read_text()  # and the run is done all the same
    planned = core_alone("plan", str(recipe))
    assert planned.returncode == 0, planned.stderr
    exported = core_alone("ckpt", "export", str(run_dir), "--out", str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("serve", "MODEL"), "serve"),
        (("sweep", "RECIPE"), "sweep"),
        (("report", "RUN", "--html", "report.html"), "report"),
    ],
)
def test_a_missing_extra_is_one_sentence(core_alone: Command, arguments: tuple[str, ...], extra: str) -> None:
    refused = core_alone(*arguments)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.endswith(f"run: pip install 'dstrain[{extra}]'")


def test_a_recipe_that_needs_an_extra_is_refused_before_anything_starts(
    core_alone: Command, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, run_dir = tmp_path / "lora.yaml", tmp_path / "run"
    recipe.write_text(resolved_yaml(tiny_recipe("model.lora.rank=2")))
    refused = core_alone("run", str(recipe), "--run-dir", str(run_dir))
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1] == (
        "error: model.lora needs the package peft, which is not here; run: pip install 'dstrain[lora]'"
    )
    assert not list(run_dir.glob("attempts/*/logs"))


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    distributions = packages_distributions()
    names = {requirement.partition(">=")[0].replace("_", "-") for requirement in project["dependencies"]}
    for extra, modules in extras.EXTRAS.items():
        brought = {one.partition(">=")[0].replace("_", "-") for one in project["optional-dependencies"][extra]}
        assert brought == {distributions[module][0].lower().replace("_", "-") for module in modules}, extra
        assert not brought & names
    assert set(project["optional-dependencies"]) - {"dev", "all"} == set(extras.EXTRAS)


def test_a_failed_import_of_something_else_is_no_missing_extra() -> None:
    assert extras.explained(ModuleNotFoundError("", name="dstrain.nothing")) is None
    assert "dstrain[tasks]" in str(extras.explained(ModuleNotFoundError("", name="sklearn.metrics")))
