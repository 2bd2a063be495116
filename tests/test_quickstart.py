"""The quickstart's own machinery: its commands exist, its recipes hold, it kills the right process in time."""

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dstrain import cli
from dstrain.plan import batch_plan
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import ClassificationRecipe, MaskedLmRecipe

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return tool("quickstart")


def test_every_command_of_the_story_is_one_that_dstrain_has(quickstart: ModuleType) -> None:
    commands = [command for stage in quickstart.STAGES for command in stage.commands]
    assert len(commands) == 16
    for program, *arguments in commands:
        if program == "python":
            assert (REPOSITORY / arguments[0]).is_file()
        else:
            assert cli.parse(arguments).handler.startswith("dstrain.")


def test_the_recipes_are_valid_and_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    pretraining = load_recipe("recipes/pretrain/quickstart.yaml", check_files=False).recipe
    assert isinstance(pretraining, MaskedLmRecipe)
    assert pretraining.train.zero.stage == 2 and pretraining.train.precision == "bf16"
    assert pretraining.model.activation_checkpointing
    batch_plan(pretraining, 2)
    for name in ("docstring-package", "docstring-package-scratch"):
        recipe = load_recipe(f"recipes/finetune/{name}.yaml", check_files=False).recipe
        assert isinstance(recipe, ClassificationRecipe)
        assert recipe.data.sequence_length <= pretraining.model.config.max_position_embeddings  # type: ignore[union-attr]
        batch_plan(recipe, 2)
    assert recipe.model.config == pretraining.model.config, "the baseline is the same encoder"


def test_the_kill_comes_after_the_first_checkpoint_and_between_two(quickstart: ModuleType) -> None:
    recipe = load_recipe(REPOSITORY / "recipes/pretrain/quickstart.yaml", check_files=False).recipe
    every = recipe.checkpoint.every_steps
    assert recipe.train.steps is not None
    assert every < quickstart.KILL_AFTER_STEP < recipe.train.steps - every
    assert quickstart.KILL_AFTER_STEP % every


@pytest.fixture
def rank() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def write_run(run_dir: Path, step: int, pid: int) -> None:
    (run_dir / "status").mkdir(parents=True, exist_ok=True)
    (run_dir / "attempts/0001/ranks").mkdir(parents=True, exist_ok=True)
    for name, content in (("attempts/0001/ranks/rank-00001.json", {"pid": pid}), ("status/here.json", {"step": step})):
        (run_dir / "new").write_text(json.dumps(content))
        (run_dir / "new").replace(run_dir / name)


def test_a_rank_is_killed_once_the_run_is_past_the_step(
    quickstart: ModuleType, tmp_path: Path, rank: subprocess.Popen[bytes]
) -> None:
    ended = threading.Event()
    told: list[str | None] = []
    watcher = threading.Thread(target=lambda: told.append(quickstart.kill_rank(tmp_path, 1, 50, ended)))
    watcher.start()
    write_run(tmp_path, 49, rank.pid)
    watcher.join(0.5)
    assert watcher.is_alive() and rank.poll() is None
    write_run(tmp_path, 50, rank.pid)
    watcher.join(10)
    assert rank.wait(10) == -9
    assert told == [f"rank 1, process {rank.pid}, was killed with SIGKILL after step 50"]


def test_nothing_is_killed_when_the_run_ended_before(
    quickstart: ModuleType, tmp_path: Path, rank: subprocess.Popen[bytes]
) -> None:
    write_run(tmp_path, 100, rank.pid)
    ended = threading.Event()
    ended.set()
    assert quickstart.kill_rank(tmp_path, 1, 50, ended) is None
    assert rank.poll() is None


def test_a_stage_is_used_again_only_if_the_same_commands_made_it(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    made = tmp_path / "thing"

    def stage(content: str) -> object:
        program = f"import pathlib; p = pathlib.Path({str(made)!r}); p.mkdir(); (p / 'x').write_text({content!r})"
        return quickstart.Stage("A thing", "Why.", (("python", "-c", program),), made)

    for content, expected in (("one", "one"), ("one", "kept"), ("two", "two")):
        one = stage(content)
        monkeypatch.setattr(quickstart, "STAGES", (one,))
        quickstart.tell(one, 0.0)
        assert (made / "x").read_text() == expected
        if content == "one":
            (made / "x").write_text("kept")
    assert "is there from an earlier call" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_story_with_its_code(quickstart: ModuleType) -> None:
    with pytest.raises(SystemExit) as stop:
        quickstart.run(("python", "-c", "raise SystemExit(7)"))
    assert stop.value.code == 7
