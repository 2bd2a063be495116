"""Queries with documents that answer them, some of them shared, a tokenizer, and a recipe for a tiny bi-encoder."""

import json
from pathlib import Path
from typing import Any

from training import model_weights, training

from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer
from dstrain.recipe.load import load_recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.reporting import Reporter

WORDS = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
RECIPE = """
task: {task}
name: tiny
model: {{architecture: {architecture}, config: {{vocab_size: 128, hidden_size: 16, num_hidden_layers: 1,
  num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 40,
  hidden_dropout_prob: {dropout}, initializer_range: 0.3,
  attention_probs_dropout_prob: {dropout}}}}}
tokenizer: {folder}/tokenizer
data: {{train: {folder}/train.jsonl, valid: {folder}/valid.jsonl, sequence_length: 24, query_length: 16, seed: 3,
  negatives_field: negatives, negatives: 2}}
train: {{global_batch_rows: 8, micro_batch_rows: 2, steps: 6, precision: fp32}}
optimizer: {{learning_rate: 1e-2}}
schedule: {{name: constant}}
log: {{tensorboard: false, every_steps: 1}}
"""


def records() -> list[dict[str, Any]]:
    """Twelve queries of 1 to 6 words. Some share a document, one has two, one's negative answers another."""
    found: list[dict[str, Any]] = []
    for number in range(12):
        query = " ".join(WORDS[(number * (step + 1) + 3) % 8] for step in range(1 + number % 6))
        query += f" {WORDS[number % 8]}"
        positive = " ".join(WORDS[(number % 5 + step * step) % 8] for step in range(2 + number % 5))
        negatives = [" ".join(WORDS[(number + k * step) % 8] for step in range(3 + k)) for k in range(1, number % 4)]
        found.append({"query": query, "positive": positive, "negatives": negatives})
    found[3]["positive"] = [found[3]["positive"], "the sky of the sky"]
    found[5]["negatives"] = [found[0]["positive"], found[5]["positive"]]
    return found


def write_queries(root: Path) -> Path:
    """Write `tokenizer/`, `train.jsonl` and `valid.jsonl` below `root`."""
    all_records = records()
    texts = [each["query"] for each in all_records] + [" ".join(WORDS)] * 9
    write_tokenizer(train_wordpiece(texts * 3, 58), root / "tokenizer", lowercase=True)
    for name, part in (("train", all_records), ("valid", all_records[2:7])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return root


def recipe_text(folder: Path, *, task: str = "retrieval", architecture: str = "bert", dropout: float = 0.0) -> str:
    """The recipe of a run in `folder`."""
    return RECIPE.format(folder=folder, task=task, architecture=architecture, dropout=dropout)


def live(
    rank: int, world: int, recipe_file: Path, run_dir: Path, steps: list[int], overrides: list[str]
) -> list[dict[str, Any]]:
    """Start a run once for each number of steps, to stop after it, and tell its weights each time."""
    found = []
    for target in steps:
        recipe = load_recipe(recipe_file, [f"train.steps={target}", *overrides]).recipe
        run_dir.mkdir(exist_ok=True)
        (run_dir / "recipe.yaml").write_text(resolved_yaml(recipe))
        with training(recipe) as (runtime, task), Reporter(runtime, recipe, run_dir, 1, target) as report:
            assert Loop(runtime, task, run_dir, report, StopRequest()).run() == "done"
            found.append(model_weights(runtime, task))
    return found
