"""Examples of all lengths whose label is their first word, a tokenizer for them, and a recipe for a tiny classifier."""

from pathlib import Path

from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer

EXAMPLES = 22
ROWS = 8

RECIPE = """
task: sequence_classification
name: tiny
model: {{architecture: {architecture}, config: {{vocab_size: 128, hidden_size: 16, num_hidden_layers: 1,
  num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 40, hidden_dropout_prob: 0.0,
  attention_probs_dropout_prob: 0.0}}}}
tokenizer: {folder}/tokenizer
data: {{train: {folder}/train.csv, valid: {folder}/valid.csv, sequence_length: 16, seed: 3}}
train: {{global_batch_rows: 8, micro_batch_rows: 2, epochs: 3, precision: fp32}}
optimizer: {{learning_rate: 1e-3}}
"""


def write_examples(root: Path) -> Path:
    """Write `tokenizer/`, `train.csv` and `valid.csv` below `root`."""
    words = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
    texts = [f"{words[n % 3]} " + " ".join(words[(n * k) % 8] for k in range(n // 2)) for n in range(EXAMPLES)]
    write_tokenizer(train_wordpiece(texts * 3, 53), root / "tokenizer", lowercase=True)
    for name, part in (("train", texts), ("valid", texts[:7])):
        (root / f"{name}.csv").write_text("text,label\n" + "".join(f"{text},{text.split()[0]}\n" for text in part))
    return root
