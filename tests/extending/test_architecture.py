"""DeBERTa-v2 in one file, that of docs/extending.md: planned, trained on two ranks, resumed on one, exported."""

from pathlib import Path

import pytest
from extension_package import InstallExtension, documented_file

pytestmark = pytest.mark.ranks

RECIPE = """\
name: deberta
task: masked_lm
model:
  architecture: deberta-v2
  config: {{vocab_size: 256, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64,
            max_position_embeddings: 64, position_buckets: 16}}
tokenizer: {tokenizer}
data: {{train: {corpus}/train, valid: {corpus}/valid, sequence_length: 32, lanes: 8}}
train: {{global_batch_rows: 8, micro_batch_rows: 2, steps: 4, precision: fp32}}
optimizer: {{learning_rate: 1e-3}}
checkpoint: {{every_steps: 2}}
log: {{every_steps: 1, tensorboard: false}}
"""
COUNT = """\
import sys, transformers
from dstrain.architectures import model_shape
from dstrain.recipe.load import load_recipe
section = load_recipe(sys.argv[1]).recipe.model
config = transformers.AutoConfig.for_model("deberta-v2", **section.config.model_dump())
model = transformers.AutoModelForMaskedLM.from_config(config)
print(sum(model_shape(section).parameters("masked_lm").values()), sum(p.numel() for p in model.parameters()))
"""


def test_an_architecture_is_one_file(
    install_extension: InstallExtension, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    extension = install_extension(
        {"dstrain_deberta": documented_file("dstrain_deberta.py")},
        {"dstrain.architectures": {"deberta-v2": "dstrain_deberta:ARCHITECTURE"}},
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(tokenizer=tiny_tokenizer, corpus=tiny_corpus))
    counts = extension.python("-c", COUNT, "recipe.yaml", cwd=tmp_path)
    counted, built = counts.stdout.split()
    assert counted == built, counts.stderr
    extension.dstrain("plan", "recipe.yaml", cwd=tmp_path)
    extension.dstrain("run", "recipe.yaml", "--procs-per-node", "2", cwd=tmp_path)
    extension.dstrain("run", "recipe.yaml", "train.steps=6", "--procs-per-node", "1", cwd=tmp_path)
    extension.dstrain("ckpt", "export", "runs/deberta", cwd=tmp_path)
    assert (tmp_path / "runs" / "deberta" / "export" / "model.safetensors").is_file()
