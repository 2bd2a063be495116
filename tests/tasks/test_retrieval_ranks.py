"""The contrastive loss is over the whole global batch, and its gradient does not show how that was split."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from searched import live, recipe_text, write_queries
from training import Pieces, relative_difference, state_pieces, train_batch, training, whole

from dstrain.data.tokens import load_document_tokenizer
from dstrain.proof.replay import Replay, replay
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe, RetrievalRecipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.contrastive import negatives_of
from dstrain.tasks.retrieval import BiEncoder, Retrieval
from dstrain.tasks.task import seeded_micro_batches

pytestmark = pytest.mark.ranks
STAGES = (0, 1, 2, 3)
# Adam's first moment after one step with beta1 = 0 is the gradient itself.
ROUNDING = 3e-6  # of fp32, relative, to the same in fp64; 4e-7 to 1.2e-6 are seen
TEMPERATURE = 0.5  # fp32 rounds cosines, and a low temperature multiplies that
PLAIN = ("train.clip_grad_norm=null", "optimizer.betas=[0.0, 0.999]", f"loss.temperature={TEMPERATURE}")


def loaded(folder: Path, *overrides: str, **keys: Any) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(recipe_text(folder, **keys))
    return load_recipe(path, [*PLAIN, *overrides]).recipe


def gradient_pieces(rank: int, world: int, recipes: list[Recipe]) -> list[tuple[Pieces, float]]:
    """On a rank: the gradient of the first global step of each recipe, and its loss."""
    results = []
    for recipe in recipes:
        with training(recipe) as (runtime, task), task.steps(0) as batches:
            (batch,) = task.completed([next(batches)])
            loss, applied = train_batch(runtime, batch, 1e-3)
            assert applied
            results.append((state_pieces(runtime, task, "exp_avg"), loss))
    return results


def reference(recipe: Recipe, folder: Path) -> tuple[dict[str, NDArray[np.float32]], float]:
    """The same step in plain torch: all texts in one batch, the loss from its definition, relevance from the file."""
    assert isinstance(recipe, RetrievalRecipe)
    encoder = load_document_tokenizer(recipe.tokenizer)
    task = Retrieval(recipe, Runtime.offline(recipe))
    task.model.double()
    with task.rank_steps(0, 1, 0) as batches:
        inputs = [each.inputs for each in next(batches).micro_batches]
    texts = [[ids for of in inputs for ids in of[key]] for key in ("input_ids", "document_ids")]
    pad = encoder.pad_id
    queries, documents = ([torch.tensor([one for one in ids.tolist() if one != pad]) for ids in part] for part in texts)
    said = [[encoder.decode(ids[1:-1].numpy()) for ids in part] for part in (queries, documents)]
    relevant: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for line in (folder / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        positives = record["positive"] if isinstance(record["positive"], list) else [record["positive"]]
        relevant[record["query"]] = set(positives)
        sizes[record["query"]] = 1 + min(2, len(set(record["negatives"]) - set(positives)))
    vectors = []
    for part in (queries, documents):
        hidden = [task.model(input_ids=ids[None]).last_hidden_state[0] for ids in part]
        means = [one[0] if recipe.pooling == "cls" else one.mean(dim=0) for one in hidden]
        vectors.append(torch.stack([one / one.norm() for one in means]))
    scores = vectors[0] @ vectors[1].T / recipe.loss.temperature
    owned = [document for positives in relevant.values() for document in positives]
    own = np.cumsum([0] + [sizes[query] for query in said[0]])[:-1].tolist()
    shared = losses = 0
    total = torch.zeros((), dtype=torch.float64)
    for row, query in enumerate(said[0]):
        rivals = [at for at, text in enumerate(said[1]) if text not in relevant[query]]
        shared += len(said[1]) - 1 - len(rivals)
        logits = scores[row].clone()
        if recipe.loss.log_q_correction:
            for at in own:
                logits[at] = logits[at] - np.log(owned.count(said[1][at]) * 8 / len(owned))
        loss = torch.logsumexp(logits[[own[row], *rivals]], dim=0) - logits[own[row]]
        if recipe.loss.symmetric:
            document = said[1][own[row]]
            askers = [at for at, other in enumerate(said[0]) if document not in relevant[other]]
            back = torch.logsumexp(scores[[row, *askers], own[row]], dim=0) - scores[row, own[row]]
            loss = (loss + back) / 2
        total = total + loss
        losses += 1
    assert losses == recipe.train.global_batch_rows and shared > 0, "nothing would show a wrong mask"
    (total / losses).backward()
    gradient = {name: p.grad.flatten().numpy() for name, p in task.model.named_parameters() if p.grad is not None}
    return gradient, total.item() / losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_queries(tmp_path_factory.mktemp("searched"))


def dense(
    rank: int, world: int, recipes: list[Recipe], folder: Path
) -> list[tuple[dict[str, NDArray[np.float32]], float]]:
    return [reference(recipe, folder) for recipe in recipes]


KINDS = {
    "symmetric": ["loss.symmetric=true"],
    "corrected": ["loss.symmetric=false", "loss.log_q_correction=true", "pooling=cls"],
    # more elements than ZeRO-3 leaves whole on every rank
    "wide": ["loss.symmetric=true", "model.config.hidden_size=64", "model.config.intermediate_size=2048"],
}


@pytest.mark.parametrize(("world", "micro_batches"), [(1, (8, 3)), (2, (2, 1)), (3, (2, 1))])
def test_one_gradient_for_every_split_and_stage(world: int, micro_batches: tuple[int, ...], folder: Path) -> None:
    cases = [*itertools.product(STAGES, micro_batches, ["symmetric"]), (0, 2, "corrected"), (3, 2, "wide")]
    recipes = [
        loaded(folder, f"train.zero.stage={stage}", f"train.micro_batch_rows={rows}", *KINDS[kind])
        for stage, rows, kind in cases
    ]
    by_rank = run_ranks(world, gradient_pieces, recipes)
    last = {kind: recipe for (_, _, kind), recipe in zip(cases, recipes, strict=True)}
    expected = dict(zip(last, run_ranks(1, dense, list(last.values()), folder)[0], strict=True))
    for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        gradient, loss = expected[case[2]]
        assert relative_difference(whole([pieces for pieces, _ in ranks]), gradient) < ROUNDING, case
        assert all(found == pytest.approx(loss, rel=1e-6) for _, found in ranks), case


def direct_gradient(rank: int, world: int, recipe: Recipe) -> tuple[Pieces, Pieces]:
    """On one rank, with dropout: the gradient of a step through two passes, and through one that keeps everything."""
    with training(recipe) as (runtime, task), task.steps(0) as batches:
        assert isinstance(task, Retrieval) and isinstance(task.module, BiEncoder)
        plain = next(batches)
        (batch,) = task.completed([plain])
        for micro_batch in seeded_micro_batches(batch, recipe.train.seed):
            loss, _ = micro_batch.run(runtime.engine)
            runtime.backward(loss, 8, is_last=micro_batch is batch.micro_batches[-1])
        twice = {(name, 0): p.grad.numpy().copy() for name, p in task.model.named_parameters() if p.grad is not None}
        task.model.zero_grad()
        (micro_batch,) = seeded_micro_batches(plain, recipe.train.seed)
        inputs = micro_batch.inputs
        vectors = torch.cat(
            [
                task.module.embed(inputs["input_ids"], inputs["attention_mask"]),
                task.module.embed(inputs["document_ids"], inputs["document_mask"]),
            ]
        )
        rows = task._chosen(0, 1, 0)[1]
        numbers = np.concatenate([row.target[1:] for row in rows])
        firsts = np.cumsum([0] + [len(row.target) - 1 for row in rows])[:-1]
        allowed = torch.tensor(negatives_of([task._known[row.example] for row in rows], numbers))
        allowed[torch.arange(8), torch.tensor(firsts)] = True
        logits = (vectors[:8] @ vectors[8:].T / TEMPERATURE).masked_fill(~allowed, -torch.inf)
        torch.nn.functional.cross_entropy(logits, torch.tensor(firsts)).backward()
        once = {(name, 0): p.grad.numpy().copy() for name, p in task.model.named_parameters() if p.grad is not None}
        return twice, once


def test_both_passes_drop_the_same(folder: Path) -> None:
    recipe = loaded(folder, "train.micro_batch_rows=8", dropout=0.2)
    ((twice, once),) = run_ranks(1, direct_gradient, recipe)
    assert relative_difference(whole([twice]), whole([once])) < 1e-6
    calm = loaded(folder, "train.micro_batch_rows=8")
    ((_, undropped),) = run_ranks(1, direct_gradient, calm)
    assert relative_difference(whole([twice]), whole([undropped])) > 0.05


def replay_step(rank: int, world: int, run_dir: Path, step: int) -> Replay:
    return replay(run_dir, step, None, None, trace=False)


def test_a_run_on_two_ranks_is_resumed_and_replayed_exactly(folder: Path) -> None:
    (folder / "dropout.yaml").write_text(recipe_text(folder, dropout=0.1))
    overrides = ["train.zero.stage=2", "evaluate.every_steps=2"]
    arguments = (folder / "dropout.yaml", folder / "whole", [6], overrides)
    ((whole_run,), _) = run_ranks(2, live, *arguments)
    ((half, parts), _) = run_ranks(2, live, folder / "dropout.yaml", folder / "parts", [3, 6], overrides)
    assert all(np.array_equal(whole_run[name], parts[name]) for name in whole_run)
    assert any(not np.array_equal(half[name], parts[name]) for name in parts)
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "rank_losses" in line]
    (found,) = run_ranks(1, replay_step, folder / "whole", 6)
    assert (trained[-1]["step"], found.same_rows) == (6, True)
    assert [one.loss for one in found.ranks] == pytest.approx(trained[-1]["rank_losses"], abs=1e-5)
    evaluated = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 6]
    assert evaluated[-1]["valid_ndcg_10"] > evaluated[-1]["valid_report"]["baselines"]["popularity"]["ndcg_10"]
    assert trained[-1]["loss"] < trained[0]["loss"]
