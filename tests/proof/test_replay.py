"""Steps of real runs computed again on one device: the same rows, losses and gradients as were logged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import RankError, run_ranks

from dstrain.checkpoint.manifest import Manifest
from dstrain.cli import main
from dstrain.proof.replay import Replay, layer_of, replay
from dstrain.proof.replay_command import replay_text, trace_text
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.main import run_rank

pytestmark = pytest.mark.ranks
RecipeMaker = Callable[..., Recipe]
DROPOUT = ("model.config.hidden_dropout_prob=0.1", "model.config.attention_probs_dropout_prob=0.1")


def run_folder(folder: Path, recipe: Recipe) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    return folder


def train(rank: int, world: int, run_dir: Path) -> str:
    return run_rank(run_dir, 1)


def replay_one(rank: int, world: int, arguments: dict[str, Any]) -> Replay:
    return replay(**{"rank": None, "world_size": None, "trace": False, **arguments})


def replayed(run_dir: Path, step: int, **arguments: Any) -> Replay:
    (found,) = run_ranks(1, replay_one, {"run_dir": run_dir, "step": step, **arguments})
    return found  # type: ignore[no-any-return]


def logged(run_dir: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: RecipeMaker) -> Path:
    """Six steps on two ranks under ZeRO-2 with dropout, and a checkpoint after the third."""
    recipe = tiny_recipe("train.steps=6", "checkpoint.every_steps=3", "train.zero.stage=2", *DROPOUT)
    folder = run_folder(tmp_path_factory.mktemp("runs") / "run", recipe)
    assert run_ranks(2, train, folder) == ["done", "done"]
    return folder


# ------------------------------------------------------------------ the same again


@pytest.mark.parametrize(("step", "steps_trained"), [(1, 0), (3, 2), (4, 0), (6, 2)])
def test_a_step_is_what_it_was(run_dir: Path, step: int, steps_trained: int) -> None:
    found = replayed(run_dir, step, rank=1)
    was = logged(run_dir)[step]
    assert found.same_rows
    assert (found.world_size, found.steps_trained) == (2, steps_trained)
    assert found.checkpoint == (None if step <= 3 else str(run_dir / "checkpoints/step-0000000003"))
    assert found.loss == pytest.approx(was["loss"], abs=1e-5)
    assert [one.loss for one in found.ranks] == pytest.approx(was["rank_losses"], abs=1e-5)
    assert [one.logged for one in found.ranks] == was["rank_losses"]
    assert found.gradient_norm == pytest.approx(was["grad_norm"], rel=1e-4)
    layers = {layer.layer: layer for layer in found.layers}
    assert set(layers) == {"bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "cls.predictions"}
    assert all(0 < (layer.rank_norm or 0) < 2 * layer.norm for layer in found.layers)
    rows = {document.row for document in found.documents}
    assert rows == {8 * (step - 1) + n for n in (1, 3, 5, 7)}  # the rows of rank 1
    assert sum(document.tokens for document in found.documents) == 4 * 32
    if steps_trained == 0:  # from a checkpoint nothing but the order of sums differs
        assert found.loss == pytest.approx(was["loss"], rel=1e-6)


def test_other_ranks_share_other_rows_and_the_whole_is_the_same(run_dir: Path) -> None:
    whole, parts = replayed(run_dir, 4), replayed(run_dir, 4, world_size=4, rank=3)
    assert whole.digest == parts.digest
    assert {document.row for document in whole.documents} == set(range(24, 32))
    assert {document.row for document in parts.documents} == {27, 31}
    assert [one.logged for one in parts.ranks] == [None] * 4  # they were two when it was logged
    text = replay_text(parts, documents_shown=1)
    assert "step 4 of 4 ranks, replayed on " in text
    assert "rows           24 to 31; digest as in the ledger" in text
    assert "train-000" in text
    assert f"… and {len(parts.documents) - 1} more" in text


@pytest.mark.parametrize("world_size", [3, 5, 8])
def test_any_number_of_ranks_up_to_the_lanes_gives_the_same_step(run_dir: Path, world_size: int) -> None:
    whole, parts = replayed(run_dir, 1), replayed(run_dir, 1, world_size=world_size)
    assert whole.digest == parts.digest == parts.ledger_digest
    assert [one.targets for one in parts.ranks] == [5 * rows for rows in rows_of_ranks(8, world_size)]
    assert sum(one.targets for one in parts.ranks) == sum(one.targets for one in whole.ranks)
    assert {(one.row, one.sample, one.text) for one in whole.documents} == {
        (one.row, one.sample, one.text) for one in parts.documents
    }


def rows_of_ranks(lanes: int, world_size: int) -> list[int]:
    return [len(range(rank, lanes, world_size)) for rank in range(world_size)]


def test_steps_are_trained_with_the_learning_rate_that_they_had(run_dir: Path, tmp_path: Path) -> None:
    """The recipe may be longer by now, and its schedule another one."""
    longer = tmp_path / "run"
    shutil.copytree(run_dir, longer)
    text = (longer / "recipe.yaml").read_text()
    assert "  steps: 6\n" in text
    (longer / "recipe.yaml").write_text(text.replace("  steps: 6\n", "  steps: 600\n"))
    found = replayed(longer, 6)
    assert found.steps_trained == 2
    assert found.loss == pytest.approx(logged(run_dir)[6]["loss"], abs=1e-5)


def test_after_a_rollback_the_dropped_rows_are_passed_over(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    """The ledger and the checkpoint of a run that rolled back from step 3 to step 2 and went on with later rows."""
    folder = run_folder(
        tmp_path / "run", tiny_recipe("train.steps=5", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    )
    run_ranks(1, train, folder)
    ledger = (folder / "ledger.jsonl").read_text().splitlines()
    moved = [json.loads(line) | {"step": json.loads(line)["step"] - 1} for line in ledger[3:]]  # batch 2 was dropped
    (folder / "ledger.jsonl").write_text("\n".join([*ledger[:3], *map(json.dumps, moved)]) + "\n")
    (folder / "checkpoints/step-0000000004/manifest.json").unlink()
    found = replayed(folder, 4)
    assert found.same_rows
    assert (found.data_step, found.rows, found.steps_trained) == (4, (32, 39), 1)
    assert [line for line in found.skipped_checkpoints if "step-0000000004" in line] == []  # not before step 4


def test_a_step_that_was_not_finite_is_traced_to_a_module(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("train.steps=8", "optimizer.learning_rate=1e30", "schedule.warmup_steps=0")
    folder = run_folder(tmp_path / "run", recipe)
    with pytest.raises(RankError, match="step 2: the loss on rank 0 is not finite"):
        run_ranks(1, train, folder)
    found = replayed(folder, 2, trace=True)
    assert found.same_rows
    assert found.steps_trained == 1
    assert found.non_finite is not None
    assert (found.non_finite.pass_name, found.non_finite.rows) == ("forward", [8, 9])
    assert found.non_finite.module.startswith("model.bert.")
    assert (found.non_finite.inputs_finite, found.non_finite.parameters_finite) == (True, True)
    assert "are not finite (rows 8, 9); its inputs are finite, its parameters finite" in trace_text(found.non_finite)
    healthy = replayed(folder, 1, trace=True)
    assert healthy.non_finite is None


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/checkpoints", "--step", "1"], "is no run's folder: it has no recipe.yaml"),
        (["{run}", "--step", "7"], "--step 7: {run} has made the steps 1 to 6; give one of them"),
        (["{run}", "--step", "0"], "--step 0: {run} has made the steps 1 to 6"),
        (["{run}", "--step", "4", "--world", "9"], "9 ranks cannot train tiny: data.lanes=8 is the most"),
        (["{run}", "--step", "4", "--rank", "2"], "--rank 2: 2 ranks are numbered 0 to 1; give one of them"),
    ],
)
def test_mistakes_are_one_message(
    words: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *(word.format(run=run_dir) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.format(run=run_dir) in error
    assert error.count("\n") == 1


def test_layers_are_named_after_their_numbers() -> None:
    assert layer_of("bert.encoder.layer.3.attention.self.query.weight") == "bert.encoder.layer.3"
    assert layer_of("model.layers.11.mlp.Wi.weight") == "model.layers.11"
    assert layer_of("bert.embeddings.LayerNorm.bias") == "bert.embeddings"
    assert layer_of("classifier.weight") == "classifier"


def test_a_checkpoint_of_another_version_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = tmp_path / "run"
    shutil.copytree(run_dir, newer)
    checkpoint = newer / "checkpoints/step-0000000003"
    (checkpoint / "manifest.json").write_text(replace(Manifest.read(checkpoint), format=99).text())
    assert main(["replay", str(newer), "--step", "5"]) == 2
    assert "manifest.json is of checkpoint format 99, this dstrain reads format" in capsys.readouterr().err


def test_the_command_prints_json_and_nothing_else(run_dir: Path) -> None:
    command = [sys.executable, "-m", "dstrain", "replay", str(run_dir), "--step", "5", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (found["step"], found["same_rows"], found["traced"]) == (5, True, False)
    assert found["loss"] == pytest.approx(found["logged_loss"], abs=1e-5)
    assert len(found["documents"]) > 8
