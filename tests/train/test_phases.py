"""Phases and sources of a run on real ranks: rows, losses, rates and the model's positions, whoever computes them."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_loop import Run, checkpoints, ledger, lines, losses, run_loops
from training import training_rows
from transformers import AutoModelForMaskedLM

from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.cli import main
from dstrain.data.shards import Corpus
from dstrain.data.stream import RowStream
from dstrain.data.tokens import load_document_tokenizer
from dstrain.data.writer import write_token_shards
from dstrain.observe.progress import Status, figures
from dstrain.proof.replay import Replay, replay
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.report.page import write_report
from dstrain.report.runs import summarize_run
from dstrain.report.text import report_text

pytestmark = pytest.mark.ranks
RECIPE = """\
name: phased
task: masked_lm
model:
  architecture: modernbert
  config: {{vocab_size: 256, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, intermediate_size: 48,
            max_position_embeddings: 32, local_attention: 16, global_rope_theta: 10000}}
tokenizer: {tokenizer}
data:
  sources:
    web: {{shards: {folder}/web, weight: 3, valid: {folder}/code}}
    code: {{shards: {folder}/code, weight: 1}}
    books: {{shards: {folder}/books, weight: 0, valid: {folder}/books}}
  sequence_length: 16
  lanes: 8
  seed: 2
train: {{global_batch_rows: 16, micro_batch_rows: 3, precision: fp32}}
optimizer: {{learning_rate: 2e-3}}
schedule: {{name: constant, warmup_steps: 2}}
phases:
  - {{name: short, steps: 4, data: {{masking: {{rate: 0.3}}}}}}
  - name: context
    steps: 3
    data: {{sequence_length: 32, masking: {{rate: {{from: 0.3, to: 0.1}}}}, sources: {{web: 1, code: 1, books: 2}}}}
    train: {{global_batch_rows: 24, micro_batch_rows: 2}}
    model: {{global_rope_theta: 160000, max_position_embeddings: 64}}
  - name: cooldown
    tokens: 1536
    data: {{sequence_length: 64, sources: {{books: 1}}}}
    train: {{global_batch_rows: 8, micro_batch_rows: 1}}
    schedule: {{name: one_minus_sqrt}}
    optimizer: {{learning_rate: 1e-3}}
evaluate: {{every_steps: 5, batches: 2}}
checkpoint: {{every_steps: 100, keep_last: 9}}
log: {{every_steps: 1, tensorboard: true}}
"""
SOURCES = ["web", "code", "books"]
OF = ("", ".web", ".books")  # of what evaluations measure
STEPS = 10
BATCHES = [16] * 4 + [24] * 3 + [8] * 3
LENGTHS = [16] * 4 + [32] * 3 + [64] * 3
TOKENS = [rows * length for rows, length in zip(BATCHES, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, tiny_texts: list[str]) -> Path:
    """Three sources of different sizes, and three phases of 4, 3 and 3 steps."""
    folder = tmp_path_factory.mktemp("phased")
    tokenizer = load_document_tokenizer(tiny_tokenizer)
    for name, texts in (("web", tiny_texts[:150]), ("code", tiny_texts[150:210]), ("books", tiny_texts[210:])):
        write_token_shards(
            folder / name,
            tokenizer.encode_many(texts),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.digest,
            shard_bytes=1 << 13,
            block_documents=16,
        )
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, tokenizer=tiny_tokenizer))
    return path


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides).recipe


def trained(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder / "metrics.jsonl") if "loss" in line]


def targets_by_source(recipe: Recipe) -> list[list[int]]:
    """By step, the targets of each source."""
    counts = []
    with RowStream(training_rows(recipe), 0, 1) as stream:
        for rows in islice(stream, STEPS):
            of_rows = (rows.labels >= 0).sum(axis=1)
            counts.append(np.bincount(rows.sources, of_rows, minlength=3).astype(int).tolist())
    return counts


@pytest.fixture(scope="module")
def runs(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole/` on one rank; `parts/` stopped at and behind borders, on 3, 2, 5 and 1 ranks; `back/` rolls back."""
    folder = tmp_path_factory.mktemp("runs")
    whole, parts, back = (folder / name for name in ("whole", "parts", "back"))
    for run in (whole, parts, back):
        run.mkdir()
        (run / "recipe.yaml").write_text(resolved_yaml(load(recipe_file)))
    for world, stage, rank, step in ((3, 2, 2, 4), (2, 3, 0, 5), (5, 1, 4, 7)):
        recipe = load(recipe_file, f"train.zero.stage={stage}", "log.tensorboard=false")
        outcomes = run_ranks(world, run_loops, [(recipe, parts, {rank: {step: "stop"}})])
        assert outcomes == [["stopped"]] * world
    going_back = load(recipe_file, "on_nan=rollback", "checkpoint.every_steps=2")
    last: list[Run] = [
        (load(recipe_file), parts, {}),
        (load(recipe_file), whole, {}),
        (going_back, back, {0: {3: "loss"}}),
    ]
    assert run_ranks(1, run_loops, last) == [["done"] * 3]
    return folder


def test_the_same_rows_and_losses_on_any_ranks_from_any_side_of_a_border(runs: Path) -> None:
    whole, parts = runs / "whole", runs / "parts"
    assert checkpoints(parts) == [4, 5, 7, 10]
    assert sorted(ledger(whole)) == list(range(1, STEPS + 1))
    assert ledger(parts) == ledger(whole)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    rows = [line["rows"] for line in lines(whole / "ledger.jsonl")]
    assert [last - first + 1 for first, last in rows] == BATCHES
    assert [first for first, _ in rows] == [0, *np.cumsum(BATCHES)[:-1].tolist()]
    for one, other in zip(trained(whole), trained(parts), strict=True):
        assert one["learning_rate"] == other["learning_rate"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for name, measured in one["sources"].items():
            if measured["rows"]:
                assert other["sources"][name] == pytest.approx(measured, rel=1e-5), (one["step"], name)
            else:
                assert other["sources"][name] == measured
    evaluated = [[line for line in lines(run / "metrics.jsonl") if "valid_loss" in line] for run in (whole, parts)]
    assert [line["step"] for line in evaluated[0]] == [5, 10]
    for one, other in zip(*evaluated, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_every_quantity_follows_from_the_step(runs: Path) -> None:
    steps = trained(runs / "whole")
    cooldown = [1e-3 * (1 - np.sqrt(passed / 3)) for passed in range(3)]
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-3, *[2e-3] * 6, *cooldown])
    assert [line["tokens"] for line in steps] == np.cumsum(TOKENS).tolist()
    assert steps[-1]["seconds_left"] == 0 < steps[-2]["seconds_left"]


def test_losses_of_sources_add_up_to_the_whole(runs: Path, recipe_file: Path) -> None:
    sizes = {name: Corpus.open(str(recipe_file.parent / name)).total_tokens for name in SOURCES}
    seen = dict.fromkeys(SOURCES, 0)
    for line, targets, length in zip(
        trained(runs / "whole"), targets_by_source(load(recipe_file)), LENGTHS, strict=True
    ):
        by_source = line["sources"]
        assert list(by_source) == SOURCES
        total = sum(by_source[name]["loss"] * n for name, n in zip(SOURCES, targets, strict=True) if n)
        assert line["loss"] == pytest.approx(total / sum(targets), rel=1e-6)
        for name, n in zip(SOURCES, targets, strict=True):
            measured = by_source[name]
            seen[name] += measured["rows"] * length
            assert measured["tokens"] == seen[name]
            assert measured["epochs"] == pytest.approx(seen[name] / sizes[name])
            assert (measured["loss"] is None) == (n == 0) == (measured["rows"] == 0)
            if n:
                assert measured["perplexity"] == pytest.approx(np.exp(measured["loss"]))
    assert sum(seen.values()) == sum(TOKENS)
    assert all(seen.values())


def test_held_out_data_of_sources_is_evaluated_by_the_recipes_rows(runs: Path) -> None:
    for line in lines(runs / "whole" / "metrics.jsonl"):
        if "valid_loss" in line:
            names = {f"valid_{metric}{of}" for metric in ("loss", "perplexity", "accuracy") for of in OF}
            assert line.keys() == {"step", *names}
            low, high = sorted([line["valid_loss.web"], line["valid_loss.books"]])
            assert low <= line["valid_loss"] <= high


def test_the_model_has_the_positions_of_the_phase_it_was_trained_in(runs: Path) -> None:
    for step, theta, positions in ((4, 10_000, 32), (5, 160_000, 64), (7, 160_000, 64), (10, 160_000, 64)):
        config = Manifest.read(checkpoint_folder(runs / "parts", step)).model_config
        assert config["rope_parameters"]["full_attention"]["rope_theta"] == theta
        assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000
        assert config["max_position_embeddings"] == positions
    exported = runs / "exported"
    assert main(["ckpt", "verify", str(runs / "parts")]) == 0
    assert main(["ckpt", "export", str(runs / "parts"), "--out", str(exported)]) == 0
    model = AutoModelForMaskedLM.from_pretrained(exported)
    frequencies = model.model.rotary_emb.full_attention_inv_freq
    torch.testing.assert_close(frequencies, 160_000 ** (-torch.arange(0, 16, 2).float() / 16))


def test_after_a_rollback_rows_go_by_the_data_step_and_the_rate_by_the_step(runs: Path) -> None:
    """Step 4, of data step 3, is not finite: back to step 2, whose successor has the first rows of the second phase."""
    written = [(line["step"], line["rows"]) for line in lines(runs / "back" / "ledger.jsonl")]
    first = [0, 16, 32, 48, 64, 88, 112, 136, 144, 152, 160, 168, 176]  # by data step; beyond the end in the last phase
    steps = [1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9, 10]
    assert written == [(step, [first[t], first[t + 1] - 1]) for t, step in enumerate(steps)]
    rates = {line["step"]: line["learning_rate"] for line in trained(runs / "back")}
    assert rates == {line["step"]: line["learning_rate"] for line in trained(runs / "whole")}
    losses_of_sources = [each["loss"] for line in trained(runs / "back") for each in line["sources"].values()]
    assert all(loss is None or np.isfinite(loss) for loss in losses_of_sources), "what was not applied counts nowhere"
    manifest = Manifest.read(checkpoint_folder(runs / "back", 10))
    assert (manifest.data_step, manifest.rollbacks) == (12, 1)


def replayed(rank: int, world: int, run_dir: Path, step: int) -> Replay:
    return replay(run_dir, step, None, None, trace=False)


@pytest.mark.parametrize(("step", "world"), [(3, 3), (6, 5)])
def test_a_step_of_unequal_ranks_is_replayed_on_one_device(step: int, world: int, runs: Path) -> None:
    logged = {line["step"]: line for line in trained(runs / "parts")}
    (again,) = run_ranks(1, replayed, runs / "parts", step)
    assert again.same_rows and again.world_size == world
    assert again.loss == pytest.approx(again.logged_loss, abs=1e-5)
    assert again.gradient_norm == pytest.approx(again.logged_gradient_norm, rel=1e-4)
    assert [each.loss for each in again.ranks] == pytest.approx(logged[step]["rank_losses"], abs=1e-5)
    assert sum(document.tokens for document in again.documents) == TOKENS[step - 1]


def test_the_report_has_each_source(runs: Path) -> None:
    run = summarize_run(runs / "whole")
    assert run.batch == "16 rows × 16 tokens → 24 rows × 32 tokens → 8 rows × 64 tokens"
    last = trained(runs / "whole")[-1]["sources"]
    assert [measured["tokens"] for measured in run.sources.values()] == [last[name]["tokens"] for name in SOURCES]
    assert all(measured["loss"] for measured in run.sources.values()), "also of those that the last step has no rows of"
    table = report_text([run]).splitlines()
    (heading,) = (number for number, line in enumerate(table) if line.startswith("source "))
    assert table[heading].split() == ["source", "tokens", "share", "epochs", "loss", "perplexity", "held-out", "loss"]
    assert [line.split()[0] for line in table[heading + 1 : heading + 4]] == SOURCES
    assert table[heading + 3].split()[-1] == f"{run.evaluation['loss.books']:.4f}"
    write_report([runs / "whole"], runs / "report.html", runs / "report.md")
    page = (runs / "report.html").read_text()
    assert "training loss by source" in page and "held-out loss, books" in page
    assert "| code |" in (runs / "report.md").read_text()


def test_status_names_the_phase_and_the_loss_of_each_source(runs: Path) -> None:
    (file,) = (runs / "whole" / "status").glob("*.json")
    status = json.loads(file.read_text())
    assert status["part"] == "phase 3 of 3, cooldown"
    assert list(status["source_losses"]) == SOURCES
    shown = figures(Status.from_json(status), status["time_unix"])
    losses_of = ", ".join(f"{name} {loss:.2f}" for name, loss in status["source_losses"].items())
    assert f"10/10 (100 %), loss {status['loss']:.4f} ({losses_of})" in shown


def test_tensorboard_has_each_source(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(runs / "whole" / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {f"{metric}/{name}" for metric in ("loss", "perplexity", "tokens", "epochs") for name in SOURCES} <= tags
    assert [event.value for event in board.Scalars("loss/code")] == pytest.approx(
        [line["sources"]["code"]["loss"] for line in trained(runs / "whole") if line["sources"]["code"]["rows"]]
    )
