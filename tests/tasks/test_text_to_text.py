"""Models that write text, trained for real: planned, resumed and exported exactly, on any ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled import write_examples
from ranks import run_ranks
from test_heads import live, logged

from dstrain.cli import main
from dstrain.plan.text import make_plan
from dstrain.recipe.load import load_recipe

pytestmark = pytest.mark.ranks

RECIPE = """
name: tiny
model: {{architecture: {architecture}, {model}}}
tokenizer: {folder}/tokenizer
data: {{train: "{folder}/train.{{en,de}}", valid: "{folder}/valid.{{en,de}}", source_field: en, target_field: de,
  sequence_length: 16, target_length: 12, seed: 3}}
train: {{global_batch_rows: 4, micro_batch_rows: 2, steps: 6, precision: fp32}}
optimizer: {{learning_rate: 1e-2}}
schedule: {{name: constant}}
checkpoint: {{every_steps: 3}}
log: {{tensorboard: false, every_steps: 1}}
loss: {{label_smoothing: 0.1}}
decoding: {{beams: 2, no_repeat_ngram: 3}}
task: sequence_to_sequence
"""
STACKS = """config: {vocab_size: 128, d_model: 16, max_position_embeddings: 40, encoder_layers: 1, decoder_layers: 2,
  encoder_attention_heads: 2, decoder_attention_heads: 4, encoder_ffn_dim: 32, decoder_ffn_dim: 24}"""
BERT = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "t5": ("t5", "config: {vocab_size: 128, d_model: 16, d_kv: 6, d_ff: 32, num_layers: 2, num_heads: 2}"),
    "bart": ("bart", STACKS),
    "marian": ("marian", STACKS),
    "two-berts": (
        "encoder-decoder",
        f"decoder_layers: 1, config: {json.dumps(BERT | {'max_position_embeddings': 40})}",
    ),
    "warm-bert": ("encoder-decoder", "decoder_layers: 1, pretrained: {folder}/bert"),
    "warm-roberta": ("encoder-decoder", "pretrained: {folder}/roberta"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parallel files, a tokenizer, and encoders to start from."""
    root = write_examples(tmp_path_factory.mktemp("pairs"))
    words = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
    for split, lines in (("train", 10), ("valid", 7)):
        texts = [" ".join(words[(n * k + 1) % 8] for k in range(1, 3 + 2 * n % 15)) for n in range(lines)]
        (root / f"{split}.en").write_text("".join(f"{text}\n" for text in texts))
        (root / f"{split}.de").write_text("".join(f"{' '.join(text.split()[::-1][:9])}\n" for text in texts))
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(1)
    BertModel(BertConfig(**BERT, max_position_embeddings=40)).save_pretrained(root / "bert")
    RobertaForMaskedLM(
        RobertaConfig(
            **BERT, max_position_embeddings=42, type_vocab_size=1, pad_token_id=0, bos_token_id=2, eos_token_id=3
        )
    ).save_pretrained(root / "roberta")
    return root


def write_recipe(folder: Path, name: str) -> Path:
    architecture, model = MODELS[name]
    path = folder / f"{name}.yaml"
    path.write_text(
        RECIPE.format(folder=folder, architecture=architecture, model=model.replace("{folder}", str(folder)))
    )
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_planned_resumed_and_exported_exactly(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(folder, name)
    ((whole,),) = run_ranks(1, live, path, folder / f"{name}-whole", [6], [])
    ((_, resumed),) = run_ranks(1, live, path, folder / f"{name}-parts", [3, 6], [])
    assert whole == resumed
    ledgers = [(folder / f"{name}-{run}" / "ledger.jsonl").read_text() for run in ("whole", "parts")]
    assert ledgers[0] == ledgers[1]
    assert make_plan(load_recipe(path).recipe, 1, None).total_parameters == sum(
        int(np.size(value)) for value in whole.values()
    )
    evaluation = next(line for line in reversed(logged(folder / f"{name}-whole")) if "valid_loss" in line)
    assert {f"valid_{metric}" for metric in ("loss", "bleu", "chrf", "baseline_bleu")} <= evaluation.keys()
    assert main(["ckpt", "export", str(folder / f"{name}-whole")]) == 0
    capsys.readouterr()
    source = folder / "valid.en"
    for rows in ("1", "3"):
        assert main(["predict", str(folder / f"{name}-whole"), str(source), "--batch-rows", rows]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["en"] for line in said] == source.read_text().splitlines()
        judged = (folder / f"{name}-whole" / "predictions-valid.jsonl").read_text().splitlines()
        assert [line["de"] for line in said] == [json.loads(line)["predicted"] for line in judged]
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    export = folder / f"{name}-whole" / "export"
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForSeq2SeqLM.from_pretrained(export)
    longest = source.read_text().splitlines()[-1]
    ids = model.generate(**tokenizer([longest], return_tensors="pt", truncation=True, return_token_type_ids=False))
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == said[-1]["de"], "Transformers alone writes the same"
