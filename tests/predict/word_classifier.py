"""A tiny classifier that has really learned which words make a text bad: what tests of its use need of a model."""

import random
from pathlib import Path

from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer

WORDS = {"good": ["nice", "fine", "great"], "bad": ["awful", "broken", "late"], "question": ["how", "where", "when"]}
FILLERS = ["the", "parcel", "courier", "price", "my", "is", "it", "was"]


def sentence(label: str, seed: int) -> str:
    """A text of this label; one of `label` "other" has a word of two labels each, and so is neither."""
    draw = random.Random(f"{label} {seed}")
    told = (
        [draw.choice(WORDS["good"]), draw.choice(WORDS["bad"])] if label == "other" else draw.choices(WORDS[label], k=2)
    )
    words = draw.choices(FILLERS, k=4) + told
    draw.shuffle(words)
    return " ".join(words)


def write_classifier(root: Path, labels: tuple[str, ...]) -> Path:
    """Train it for a second, to be unsure of others too, and write the Transformers folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    words = [word for group in WORDS.values() for word in group] + FILLERS
    write_tokenizer(train_wordpiece([" ".join(words)] * 3, 80), root, lowercase=True)
    tokenizer = AutoTokenizer.from_pretrained(root)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = dict(enumerate(labels))
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=128, max_position_embeddings=32, id2label=names, **sizes, **rates)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        chosen = [(step * 32 + n) % len(labels) for n in range(32)]
        texts = [sentence(labels[at], step * 32 + n) for n, at in enumerate(chosen)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        unsure = tokenizer([sentence("other", step * 8 + n) for n in range(8)], return_tensors="pt", padding=True)
        loss = model(**batch, labels=torch.tensor(chosen)).loss
        right = loss.item()
        loss = loss - model(**unsure).logits.log_softmax(dim=-1).mean()  # towards all labels alike
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right < 0.1, "these words are easily told apart"
    model.save_pretrained(root)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(root)
    return root
