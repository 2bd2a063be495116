"""`dstrain eval`: what a run said of itself, said again of its checkpoints by one process."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks

from dstrain.cli import main
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.main import run_rank

pytestmark = pytest.mark.ranks


def train(rank: int, world_size: int, run_dir: Path) -> str:
    return run_rank(run_dir, 1)


def command(rank: int, world_size: int, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `dstrain eval`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["eval", *arguments])
    return code, out.getvalue(), err.getvalue()


def test_a_checkpoint_of_several_ranks_scores_what_the_run_has_logged(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe("train.steps=4", "checkpoint.every_steps=2", "evaluate.every_steps=2", "train.zero.stage=3",
                         "schedule.warmup_steps=0")  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(resolved_yaml(recipe))
    assert run_ranks(2, train, run) == ["done", "done"]
    logged = {
        line["step"]: line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "valid_loss" in line
    }
    second = run / "checkpoints/step-0000000002"
    for step, checkpoint in ((4, run), (2, second)):
        ((code, out, err),) = run_ranks(1, command, str(checkpoint), "--json")
        assert (code, err) == (0, "")
        said = json.loads(out)
        assert (said["step"], said["split"]) == (step, "valid")
        assert said["metrics"]["loss"] == pytest.approx(logged[step]["valid_loss"], rel=1e-6)
        assert said["metrics"]["accuracy"] == logged[step]["valid_accuracy"]
    ((code, out, _),) = run_ranks(1, command, str(run), "--step", "2", "evaluate.batches=1")
    assert code == 0
    assert f"{second}, data.valid: " in out
    assert "  loss  " in out
    for mistake, says in (
        (["--step", "3"], "steps 4, 2"),
        (["--split", "test"], "no data.test"),
        (["data.seed=9"], "data.seed: 1 → 9"),
        (["data.valdi=x"], "data.valid"),
    ):
        ((code, out, err),) = run_ranks(1, command, str(run), *mistake)
        assert (code, out) == (2, "")
        assert says in err
