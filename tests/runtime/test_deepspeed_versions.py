"""The oldest and the newest DeepSpeed of the range, and some between, each trains, saves and loads."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dstrain.recipe.schema import Recipe
from dstrain.runtime.insides import TRIED_VERSIONS

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "deepspeed_version.py"


@pytest.mark.ranks
@pytest.mark.parametrize("version", TRIED_VERSIONS["deepspeed"])
def test_it_trains_saves_and_loads(version: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe().model_dump(mode="json", by_alias=True, exclude_unset=True)))
    library = tmp_path / "library"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", library]
    subprocess.run([*install, f"deepspeed=={version}"], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    paths = [library, ROOT, ROOT / "tests", ROOT / "tests" / "checkpoint"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    ran = subprocess.run(
        [sys.executable, PROGRAM, recipe, tmp_path / "checkpoints"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.splitlines()[-1] == version


def test_the_range_that_is_installed_is_what_was_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (deepspeed,) = (line for line in project["dependencies"] if line.startswith("deepspeed"))
    tried = TRIED_VERSIONS["deepspeed"]
    oldest, below = re.fullmatch(r"deepspeed>=([\d.]+),<([\d.]+)", deepspeed).groups()  # type: ignore[union-attr]
    assert oldest == tried[0]
    major, minor, *_ = map(int, tried[-1].split("."))
    assert below == f"{major}.{minor + 1}"
