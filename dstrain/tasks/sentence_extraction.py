"""Sentence extraction: the sentences of a text that sum it up (extractive summarisation), scored by ROUGE.

    [CLS] sentence sentence … [SEP] ─► a number for each token ─► its mean over each sentence ─► the best sentences

The model sees the whole text at once, and as it saw texts in pretraining. It learns by a softmax over a text's
sentences, towards those that are most like its summary. Means over tokens, where Liu and Lapata (2019) put a [CLS]
before each sentence, give every token a gradient: it learns in a few hundred steps, whatever the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from dstrain.model.encoder import build_model
from dstrain.recipe.schema import SentenceExtractionRecipe
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.sentences import (
    NO_SCORE,
    SplitText,
    best,
    joined,
    most_alike,
    padded_sentences,
    sentence_scores,
    split_texts,
)
from dstrain.tasks.splits import SplitReader, Splits
from dstrain.tasks.task import Inputs
from dstrain.tasks.text_pairs import TextPair, read_text_pairs
from dstrain.tasks.token_classification import TokenClassification
from dstrain.tasks.writing_scores import Judge, rouge_scores, summary_baselines

NO_SENTENCE = -1.0  # label behind the last sentence of a text


@dataclass(frozen=True)
class SplitRow(Row):
    """A text in sentences. `target`: the share of the probability that each sentence ought to have, fp32."""

    text: SplitText | None = None


class SentenceFinder(Head):
    """A Transformers token classifier of one label. `outputs` are the scores of sentences, fp32 (rows, sentences)."""

    def forward(self, labels: Tensor, sentences: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the rows' losses, and number of rows whose best sentence is one of the right ones, fp32 scalars.

        Args:
            labels: fp32 (rows, sentences): shares of the probability, `NO_SENTENCE` behind a text's last sentence.
            sentences: int64 (rows, tokens), the number of the sentence that a token is of, -1 for none.
            inputs: `input_ids` and `attention_mask`, int64 (rows, tokens).
        """
        logits = self.model(**inputs).logits[..., 0]  # (rows, tokens)
        scores = sentence_scores(logits, sentences, labels.shape[1]).masked_fill(labels < 0, NO_SCORE)
        self.outputs = scores.detach()
        loss = -(labels * scores.log_softmax(dim=-1).masked_fill(labels <= 0, 0.0)).sum()
        chosen = labels.gather(1, self.outputs.argmax(dim=-1, keepdim=True))
        return loss, (chosen > 0).sum(dtype=torch.float32)


class SentenceExtraction(ExampleTask[TextPair]):
    """The `sentence_extraction` task on one rank."""

    auto_model = AutoModelForTokenClassification
    _recipe: SentenceExtractionRecipe

    def read(self) -> tuple[Splits[TextPair], SplitReader]:
        """See `ExampleTask`."""
        data = self._recipe.data
        self._judge = Judge(
            rouge_scores,
            data.language,
            summary_baselines(data.language, data.sentences),
            {"the best choice there is": lambda pair: self._text(pair, self._most_alike(pair))},
        )
        return read_text_pairs(data)

    def build(self) -> Head:
        """See `ExampleTask`."""
        special_ids, seed = self.encoder.special_token_ids, self._recipe.train.seed
        return SentenceFinder(build_model(self._recipe.model, seed, special_ids, auto=self.auto_model, num_labels=1))

    def make_rows(self, split: str, examples: list[TextPair]) -> list[Row]:
        """See `ExampleTask`: one row an example. One whose summary shares no word with it has no loss."""
        sentences = [example.sentences for example in examples]
        rows: list[Row] = []
        for number, text in enumerate(split_texts(self.encoder, sentences, self._recipe.data.sequence_length)):
            target = np.zeros(text.count, np.float32)
            right = self._most_alike(examples[number], text.count)
            target[right] = 1 / max(len(right), 1)
            rows.append(SplitRow(text.ids, target, number, text.count, int(len(right) > 0), text=text))
        return rows

    def notes_on_rows(self) -> list[str]:
        """See `ExampleTask`."""
        train, length = self.rows["train"], self._recipe.data.sequence_length
        cut = sum(len(row.target) < len(self.splits.train[row.example].sentences) for row in train)
        without = sum(row.targets == 0 for row in train)
        notes = {
            f"have sentences that do not fit in data.sequence_length={length}; these are never chosen": cut,
            "have no sentence with a word of the summary; they are not trained on": without,
        }
        return [f"data.train: {count:,} of {len(train):,} texts {words}" for words, count in notes.items() if count]

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """See `ExampleTask`."""
        inputs = super().inputs(rows)
        texts = [row.text for row in rows if isinstance(row, SplitRow) and row.text is not None]
        sentences = padded_sentences(texts, inputs["input_ids"].shape[1])
        return inputs | {"sentences": sentences.to(self.runtime.device)}

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """See `ExampleTask`: fp32 (rows, sentences)."""
        labels = np.full((len(rows), max(len(row.target) for row in rows)), NO_SENTENCE, np.float32)
        for number, row in enumerate(rows):
            labels[number, : len(row.target)] = row.target
        return torch.from_numpy(labels)

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: the score of each sentence that the model saw."""
        scores = self.module.outputs.cpu().numpy().astype(np.float64)
        return [own[: len(row.target)] for own, row in zip(scores, rows, strict=True)]

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`."""
        pairs = self.splits.named()[split]
        texts = [
            self._text(pair, best(answer, self._recipe.data.sentences))
            for pair, answer in zip(pairs, answers, strict=True)
        ]
        return self._judge.scores(split, pairs, texts)

    def _most_alike(self, pair: TextPair, among: int | None = None) -> list[int]:
        """The sentences, of the first `among`, that the model ought to choose."""
        data = self._recipe.data
        return most_alike(pair.sentences[:among], pair.targets, data.sentences, data.language)

    def _text(self, pair: TextPair, chosen: Sequence[int]) -> str:
        return joined([pair.sentences[number] for number in chosen], self._recipe.data.language)

    def described(self, example: TextPair) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        return example.line, " | ".join(example.targets), example.source

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`: (tokens, 1) of each document."""
        return TokenClassification.training_logits(model, documents)
