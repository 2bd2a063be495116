"""A small valid recipe for tests, as YAML text and as files."""

from pathlib import Path

VALID = """\
name: example
task: masked_lm
model:
  architecture: bert
  config: {hidden_size: 128, num_attention_heads: 2}
tokenizer: tok
data:
  train: shards
  sequence_length: 128
  lanes: 64
train:
  global_batch_rows: 512
  micro_batch_rows: 4
  steps: 100
optimizer:
  learning_rate: 3e-4
"""


def write(folder: Path, text: str = VALID, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)
