"""A SLURM cluster and ssh hosts, really started, once per session. Every test below this folder is marked `cluster`."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_run import DSTRAIN, SECRET, STEPS, Project

from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "lab"))

from slurm_lab import SlurmLab
from ssh_lab import SshLab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(1500))  # what a test waits for has limits of its own


@pytest.fixture(scope="session")
def slurm_lab() -> Iterator[SlurmLab]:
    """Three nodes. `slurm_lab.run("sbatch", …)`; `env=os.environ | slurm_lab.env` for what the test starts itself."""
    if reason := SlurmLab.cannot_run():
        pytest.skip(reason)
    # not pytest's own folder: a daemon's socket needs a short path, and a lab is never kept
    lab = SlurmLab(Path(tempfile.mkdtemp(prefix="lab-slurm-")))
    try:
        lab.up()
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="session")
def ssh_lab() -> Iterator[SshLab]:
    """`ctl` and three nodes. `ssh_lab.on("ctl", ["ssh", "node1", "hostname"])`."""
    if reason := SshLab.cannot_run():
        pytest.skip(reason)
    lab = SshLab(Path(tempfile.mkdtemp(prefix="lab-ssh-")))
    try:
        lab.up()
        yield lab
    finally:
        lab.down()


@pytest.fixture(autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave a lab to the next test without jobs, and with every host on and reachable."""
    yield
    for name in {"slurm_lab", "ssh_lab"} & set(request.fixturenames):
        lab: SlurmLab | SshLab = request.getfixturevalue(name)
        lab.reset()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., Recipe]) -> Path:
    """tiny.yaml beside an uninterrupted run of it by one process of this machine. 1 to 6 ranks can train it."""
    folder = tmp_path_factory.mktemp("reference")
    # 24 rows, one at a time: a step takes about a sixth of a second, so that it can be caught
    batch = ("data.lanes=6", "train.global_batch_rows=24", "train.micro_batch_rows=1")
    recipe = tiny_recipe(f"train.steps={STEPS}", "checkpoint.every_steps=10", "train.zero.stage=1", *batch)
    (folder / "tiny.yaml").write_text(resolved_yaml(recipe))
    command = [*DSTRAIN, "run", "tiny.yaml", "--run-dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=600, capture_output=True)
    return folder


@pytest.fixture
def project(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    (tmp_path / "tiny.yaml").write_text((reference / "tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("NOBODY_NAMED_THIS", "1")
    monkeypatch.setenv("SBATCH_EXPORT", "ALL")  # would win over what the batch script says
    return Project(tmp_path, reference / "run")
