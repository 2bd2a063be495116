"""Pairs beside masked tokens: one loss for every split, resumed and replayed exactly, planned and exported as it is."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from test_heads import live
from torch import nn
from training import (
    Pieces,
    dense_labels,
    relative_difference,
    state_pieces,
    train_batch,
    training,
    training_rows,
    whole,
)
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertForPreTraining,
)

from dstrain.architectures import document_mask
from dstrain.checkpoint.manifest import Manifest
from dstrain.cli import main
from dstrain.data.ledger import compare_ledgers
from dstrain.data.pairs import token_types
from dstrain.data.stream import RowStream
from dstrain.model.encoder import build_model
from dstrain.plan.text import make_plan
from dstrain.proof.replay import Replay, replay
from dstrain.recipe.definition import definition_of
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.masked_lm import MaskedLm
from dstrain.train.main import build_task

pytestmark = pytest.mark.ranks
RecipeMaker = Callable[..., Recipe]
PAIRS = (
    "data.pairs={objective: next_sentence, tokens: 32}",
    "data.sequence_length=80",
    "model.config.max_position_embeddings=80",
    "data.prefetch_steps=0",
)
# Adam's first moment after one step with beta1 = 0 is the gradient itself.
GRADIENT = ("train.clip_grad_norm=null", "optimizer.betas=[0.0, 0.999]")


def first_gradients(rank: int, world: int, recipes: list[Recipe]) -> list[tuple[Pieces, float, dict[str, float]]]:
    """On a rank: of each recipe the gradient of the first global step, its loss, and what an evaluation then says."""
    results = []
    for recipe in recipes:
        with training(recipe) as (runtime, task):
            with task.steps(0) as batches:
                (batch,) = task.completed([next(batches)])
                loss, applied = train_batch(runtime, batch, 1e-3)
            assert applied
            runtime.engine.eval()
            with torch.no_grad():
                metrics = task.evaluate(runtime, runtime.engine)
            results.append((state_pieces(runtime, task, "exp_avg"), loss, metrics))
    return results


def reference(recipe: Recipe) -> tuple[dict[str, NDArray[np.float32]], float]:
    """The same step in plain torch and Transformers: each pair alone through the pooler, two means added."""
    assert isinstance(recipe, MaskedLmRecipe)
    with RowStream(training_rows(recipe), 0, 1) as stream:
        rows = next(stream)
        labels = dense_labels(rows)
        arrays = (rows.input_ids, rows.position_ids, token_types(rows.pairs, rows.input_ids.shape[1]), labels)
        input_ids, position_ids, types, labels = (torch.from_numpy(a.astype(np.int64)) for a in arrays)
        pairs = [(number, *pair) for number, own in enumerate(rows.pairs.tolist()) for pair in own if pair[3] >= 0]
    counts = Counter(number for number, *_ in pairs)
    assert len(set(counts.values())) > 1, "rows of equal weight would not show a wrong mean"
    model = build_model(recipe.model, recipe.train.seed, {"pad_token_id": 0}, auto=AutoModelForPreTraining)
    outputs = model(
        input_ids=input_ids,
        position_ids=position_ids,
        token_type_ids=types,
        attention_mask=document_mask(position_ids),
    )
    loss = nn.functional.cross_entropy(outputs.prediction_logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    logits = [
        model(input_ids=input_ids[number, None, start:end], token_type_ids=types[number, None, start:end])
        for number, start, _, end, _ in pairs
    ]
    judged = torch.cat([each.seq_relationship_logits for each in logits])
    loss = loss + nn.functional.cross_entropy(judged, torch.tensor([label for *_, label in pairs]))
    loss.backward()
    return {name: p.grad.flatten().numpy() for name, p in model.named_parameters()}, loss.item()


def test_one_gradient_for_every_split_and_stage(tiny_recipe: RecipeMaker) -> None:
    splits = [(1, 8, 0), (1, 3, 0), (2, 2, 0), (3, 1, 3), (3, 2, 1)]  # ranks, most rows of a micro-batch, ZeRO stage
    by_world: dict[int, list[Recipe]] = {}
    for world, rows, stage in splits:
        overrides = (f"train.micro_batch_rows={rows}", f"train.zero.stage={stage}", *PAIRS, *GRADIENT)
        by_world.setdefault(world, []).append(tiny_recipe(*overrides))
    expected, expected_loss = reference(by_world[1][0])
    found = []
    for world, recipes in by_world.items():
        for ranks in zip(*run_ranks(world, first_gradients, recipes), strict=True):
            gradient = whole([pieces for pieces, _, _ in ranks])
            assert relative_difference(gradient, expected) < 1e-6
            assert all(loss == pytest.approx(expected_loss, rel=1e-6) for _, loss, _ in ranks)
            found += [metrics for _, _, metrics in ranks]
    for metrics in found:
        assert metrics == pytest.approx(found[0], rel=1e-5)
        assert metrics.keys() == definition_of("masked_lm").measures.keys()
        assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"])) == pytest.approx(256, rel=0.2)
        assert metrics["pair_loss"] == pytest.approx(np.log(2), rel=0.1)
        assert 0.2 < metrics["pair_accuracy"] < 0.8


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: RecipeMaker) -> Path:
    """Six steps of sentence-order prediction on two ranks, and the same run broken off after three."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        *("data.pairs={objective: sentence_order, tokens: 32}", "train.zero.stage=2"),
        *("evaluate.every_steps=6", "model.config.hidden_dropout_prob=0.1"),
        *("schedule.name=constant", "schedule.warmup_steps=0", "checkpoint.every_steps=3"),
    ]
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(resolved_yaml(tiny_recipe(*overrides)))
    run_ranks(2, whole_and_parts, recipe_file, folder)
    return folder / "whole"


def whole_and_parts(rank: int, world: int, recipe_file: Path, folder: Path) -> None:
    (uninterrupted,) = live(rank, world, recipe_file, folder / "whole", [6], [])
    _, resumed = live(rank, world, recipe_file, folder / "parts", [3, 6], [])
    assert uninterrupted == resumed, "resumed to the last bit"


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def replay_step(rank: int, world: int, run_dir: Path, step: int) -> Replay:
    return replay(run_dir, step, None, None, trace=False)


def test_a_run_is_resumed_and_replayed_exactly(run_dir: Path) -> None:
    compared = compare_ledgers(run_dir / "ledger.jsonl", run_dir.parent / "parts" / "ledger.jsonl")
    assert (compared.common_steps, compared.first_difference) == (6, None)
    trained = [line for line in logged(run_dir) if "rank_losses" in line]
    (found,) = run_ranks(1, replay_step, run_dir, 6)
    assert (trained[-1]["step"], found.same_rows) == (6, True)
    assert found.loss == pytest.approx(trained[-1]["loss"], abs=1e-5)
    assert [one.loss for one in found.ranks] == pytest.approx(trained[-1]["rank_losses"], abs=1e-5)
    assert {"bert.pooler", "cls.seq_relationship"} <= {layer.layer for layer in found.layers if layer.norm > 0}
    (evaluated,) = (line for line in logged(run_dir) if "valid_loss" in line)
    assert evaluated["valid_perplexity"] == pytest.approx(np.exp(evaluated["valid_loss"]))
    assert 0.4 < evaluated["valid_pair_loss"] < 1.0 and 0 < evaluated["valid_pair_accuracy"] < 1


def test_a_run_is_planned_and_exported_as_it_is(run_dir: Path, tmp_path: Path) -> None:
    recipe = load_recipe(run_dir / "recipe.yaml").recipe
    out = tmp_path / "export"
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert main(["ckpt", "export", str(run_dir), "--out", str(out)]) == 0
    exported = AutoModelForPreTraining.from_pretrained(out)
    assert type(exported) is BertForPreTraining
    plan = make_plan(recipe, 1, None)
    assert plan.total_parameters == sum(parameter.numel() for parameter in exported.parameters())
    manifest = Manifest.read(run_dir / "checkpoints" / "step-0000000006")
    assert manifest.identity["data"]["pairs"] == {"objective": "sentence_order", "tokens": 32}
    saved = sum(about["bytes"] for about in manifest.files.values())
    assert plan.checkpoint_bytes < saved < plan.checkpoint_bytes + 10_000 + 300 * len(manifest.parameters)

    weights = exported.state_dict()
    for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(out).state_dict()
        shared = loaded.keys() & weights.keys()
        assert {"bert.embeddings.token_type_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"} <= shared
        assert all(torch.equal(loaded[name], weights[name]) for name in shared)


def test_the_head_for_pairs_is_new_where_a_pretrained_model_has_none(tiny_recipe: RecipeMaker, tmp_path: Path) -> None:
    """And it is drawn by the seed, so that every rank has the same."""
    plain = build_model(tiny_recipe().model, 0, {"pad_token_id": 0})
    plain.save_pretrained(tmp_path)
    rows = (PAIRS[0], "data.sequence_length=64")
    section = tiny_recipe(*rows, "model.config=null", f"model.pretrained={tmp_path}").model
    one, other = (build_model(section, 7, {}, auto=AutoModelForPreTraining).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["cls.seq_relationship.weight"].std() > 0
    shared = plain.state_dict().keys() & one.keys()
    assert shared == plain.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[name], one[name]) for name in shared)


def test_without_pairs_nothing_knows_of_them(tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe()
    task = build_task(recipe, Runtime.offline(recipe))
    assert type(task) is MaskedLm
    assert task.identity()["data"]["pairs"]["objective"] == "none"
    assert "pair head" not in make_plan(recipe, 1, None).parameters
    with task.steps(0) as batches:
        (micro_batch, *_) = next(batches).micro_batches
    assert list(micro_batch.inputs) == ["input_ids", "position_ids", "masked_positions", "labels"]
