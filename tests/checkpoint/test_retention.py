"""Which checkpoints are kept: pure rules, what counts, and what the command says and does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import synthetic_checkpoint

from dstrain.checkpoint.manifest import MANIFEST, checkpoint_folder, committed, step_of
from dstrain.checkpoint.retention import Candidate, Retention, prune, reasons_to_keep
from dstrain.cli import main
from dstrain.plan import kept_checkpoints
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.recipe.training import KeepBest

LOSSES = {10: 3.0, 20: 1.0, 30: 1.0, 40: 2.0, 50: 2.5}
CANDIDATES = [Candidate(step, {"valid_loss": loss, "valid_f1": -loss}) for step, loss in sorted(LOSSES.items())[::-1]]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), {50: "one of the last 2", 40: "one of the last 2"}),
        (Retention(9), dict.fromkeys([50, 40, 30, 20, 10], "one of the last 9")),
        (Retention(1, 20), {50: "one of the last 1", 40: "every 20 steps", 20: "every 20 steps"}),
        (
            Retention(1, None, KeepBest(metric="valid_loss", count=2)),
            {50: "one of the last 1", 30: "best valid_loss: 1", 20: "best valid_loss: 1"},
        ),
        (Retention(1, None, KeepBest(metric="valid_loss")), {50: "one of the last 1", 30: "best valid_loss: 1"}),
        (Retention(1, None, KeepBest(metric="valid_f1")), {50: "one of the last 1", 30: "best valid_f1: -1"}),
        (
            Retention(1, None, KeepBest(metric="valid_loss", best="highest")),
            {50: "one of the last 1", 10: "best valid_loss: 3"},
        ),
        (Retention(1, None, KeepBest(metric="valid_unknown")), {50: "one of the last 1"}),
    ],
)
def test_rules(retention: Retention, kept: dict[int, str]) -> None:
    assert reasons_to_keep(CANDIDATES, retention) == kept


def test_what_early_stopping_chose_is_kept() -> None:
    candidates = [Candidate(40, {}, 20), Candidate(30, {}, 10), Candidate(20, {}, 10), Candidate(10, {}, None)]
    chosen = {40: "one of the last 1", 20: "best evaluation, by early_stopping"}
    assert reasons_to_keep(candidates, Retention(1)) == chosen


@pytest.fixture
def run_dir(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> Path:
    for step, loss in LOSSES.items():
        synthetic_checkpoint(tmp_path, step, scores={"valid_loss": loss})
    rules = ("keep_last=1", "keep_every=40", "every_steps=10", "keep_best.metric=valid_loss")
    recipe = tiny_recipe(*(f"checkpoint.{rule}" for rule in rules), "evaluate.every_steps=10")
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    return tmp_path


def steps(run_dir: Path) -> list[int | None]:
    return [step_of(folder) for folder in committed(run_dir)]


def test_damaged_ones_do_not_count_and_are_left(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint_folder(run_dir, 50) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])  # shorter: seen at once
    other = checkpoint_folder(run_dir, 30) / "rank-00000.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + b"?")  # seen by a verification only
    assert main(["ckpt", "verify", str(other.parent)]) == 2
    (checkpoint_folder(run_dir, 20) / MANIFEST).unlink()
    best = Retention(1, None, KeepBest(metric="valid_loss"))
    assert [step_of(folder) for folder in prune(run_dir, best, up_to_step=50)] == [10]
    assert steps(run_dir) == [50, 40, 30, 20], "40 is the last sound one, and the best of the sound ones"
    capsys.readouterr()
    assert main(["ckpt", "prune", str(run_dir), "--keep", "1"]) == 0
    printed = capsys.readouterr().out
    assert "skipped step-0000000050: " in printed
    assert "step-0000000030 is damaged; left where it is\nstep-0000000020 is damaged; left where it is" in printed


def test_prune_by_the_rules_of_the_recipe(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "prune", str(run_dir), "--dry-run"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [(Path(folder).name[-2:], why) for folder, why in lines] == [
        ("50", "one of the last 1"),
        ("40", "every 40 steps"),
        ("30", "best valid_loss: 1"),
        ("20", "would be removed"),
        ("10", "would be removed"),
    ]
    assert len(steps(run_dir)) == 5
    assert main(["ckpt", "prune", str(run_dir)]) == 0
    assert steps(run_dir) == [50, 40, 30]
    shutil.rmtree(run_dir / "checkpoints" / "step-0000000040")
    (run_dir / "recipe.yaml").unlink()
    assert main(["ckpt", "prune", str(run_dir)]) == 2
    assert "has no recipe.yaml, whose rules would say what to keep; give --keep N" in capsys.readouterr().err


def test_how_many_there_can_be(tiny_recipe: Callable[..., Recipe]) -> None:
    def kept(last: int, *overrides: str) -> int:
        every = "checkpoint.every_steps=10"
        return kept_checkpoints(tiny_recipe(every, f"checkpoint.keep_last={last}", *overrides), 100)

    assert kept(3) == 3
    assert kept(3, "checkpoint.keep_every=50") == 5
    assert kept(3, "checkpoint.keep_best.metric=valid_loss", "evaluate.every_steps=10") == 4
    assert kept(1_000_000) == 10
    assert kept_checkpoints(tiny_recipe("checkpoint.keep_last=4"), None) == 4
