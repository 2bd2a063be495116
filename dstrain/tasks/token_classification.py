"""Token classification: a tag for each word, read off its first piece; long texts in windows that overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from dstrain.model.encoder import build_model, labels_of_head
from dstrain.recipe.schema import TokenClassificationRecipe
from dstrain.tasks.batching import padded
from dstrain.tasks.calibration import binned
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.splits import SplitReader, Splits
from dstrain.tasks.tags import OUTSIDE, Sentence, pieces_of_words, read_sentences, shown_tags, tag_scores

NOT_A_WORD = -100  # label of a piece that begins no word, or whose word another window owns


@dataclass(frozen=True)
class TaggedRow(Row):
    """A window. `target` has one label a piece, `words` are the numbers of the words that it owns."""

    words: NDArray[np.int64] | None = None


class Tagger(Head):
    """A Transformers token classifier. `outputs` (rows, tokens, 2): the label it chose, and its probability, fp32."""

    def __init__(self, model: PreTrainedModel, weights: Tensor, label_smoothing: float) -> None:
        """`weights`: fp32 (labels,), by which the losses of a label's words are multiplied."""
        super().__init__(model)
        self.weights, self._label_smoothing = weights, label_smoothing

    def forward(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the words' losses and number of words that are right, both fp32 scalars.

        Args:
            labels: int64 (rows, tokens), `NOT_A_WORD` at pieces that have no loss.
            inputs: `input_ids` and `attention_mask`, int64 (rows, tokens).
        """
        logits = self.model(**inputs).logits.float()  # (rows, tokens, labels)
        best, chosen = logits.detach().max(dim=-1)
        sure = (best - logits.detach().logsumexp(dim=-1)).exp()
        self.outputs = torch.stack([chosen.float(), sure], dim=-1)
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            reduction="none",
            ignore_index=NOT_A_WORD,
            label_smoothing=self._label_smoothing,
        )
        loss = (each * self.weights.to(logits.device)[labels.flatten().clamp(min=0)]).sum()
        return loss, (chosen == labels).sum(dtype=torch.float32)


class TokenClassification(ExampleTask[Sentence]):
    """The `token_classification` task on one rank."""

    auto_model = AutoModelForTokenClassification
    _recipe: TokenClassificationRecipe

    def read(self) -> tuple[Splits[Sentence], SplitReader]:
        """See `ExampleTask`."""
        tags, splits, reader = read_sentences(self._recipe.data)
        self.tags = labels_of_head(self._recipe.model, self.auto_model, tags)
        return splits, reader

    def build(self) -> Head:
        """See `ExampleTask`."""
        recipe = self._recipe
        model = build_model(
            recipe.model, recipe.train.seed, self.encoder.special_token_ids, auto=self.auto_model, labels=self.tags
        )
        return Tagger(model, self._class_weights(), recipe.loss.label_smoothing)

    def _class_weights(self) -> Tensor:
        """1 for each tag, or what makes tags weigh alike: words ÷ (tags × words with it), 1 on average."""
        if self._recipe.loss.class_weights == "none":
            return torch.ones(len(self.tags))
        counts = np.zeros(len(self.tags))
        for sentence in self.splits.train:
            for tag in sentence.tags:
                counts[self.tags.index(tag)] += 1
        weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32)

    def make_rows(self, split: str, examples: list[Sentence]) -> list[Row]:
        """See `ExampleTask`: a sentence that is too long gives several."""
        data, index = self._recipe.data, {tag: number for number, tag in enumerate(self.tags)}
        rows: list[Row] = []
        found = pieces_of_words(self.encoder, [sentence.words for sentence in examples], data.joiner)
        for number, (sentence, pieces) in enumerate(zip(examples, found, strict=True)):
            for ids, window in pieces.windows(self.encoder, data.sequence_length, data.stride):
                words, places = pieces.owned(window)
                target = np.full(len(ids), NOT_A_WORD, np.int64)
                target[places] = [index[sentence.tags[word]] for word in words.tolist()]
                rows.append(TaggedRow(ids, target, number, 2 * len(words), targets=len(words), words=words))
        return rows

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """See `ExampleTask`."""
        labels = np.full((len(rows), width), NOT_A_WORD, np.int64)
        for number, row in enumerate(rows):
            labels[number, : len(row.target)] = row.target
        return torch.from_numpy(labels)

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: of each word that a row owns the number of its tag, and its probability."""
        found = self.module.outputs.cpu().numpy().astype(np.float64)
        return [found[number, : len(row.target)][row.target >= 0].ravel() for number, row in enumerate(rows)]

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`. A word without a piece, such as a control character, is O, and has no probability."""
        sentences = self.splits.named()[split]
        predicted = [[OUTSIDE] * len(sentence.words) for sentence in sentences]
        sure: list[list[tuple[float, bool]]] = [[] for _ in sentences]  # of words: the probability, and whether right
        for row, answer in zip(self.rows[split], answers, strict=True):
            assert isinstance(row, TaggedRow) and row.words is not None
            for word, (tag, probability) in zip(row.words.tolist(), answer.reshape(-1, 2).tolist(), strict=True):
                said = predicted[row.example][word] = self.tags[int(tag)]
                sure[row.example].append((probability, said == sentences[row.example].tags[word]))
        scores = tag_scores([sentence.tags for sentence in sentences], predicted, self.tags)
        for each, sentence, tags, words in zip(scores["judged"], sentences, predicted, sure, strict=True):
            each["predicted"] = shown_tags(sentence.words, tags)
            each["calibration"] = binned(*np.array(words).reshape(-1, 2).T)
        return scores

    def described(self, example: Sentence) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        return example.line, shown_tags(example.words, example.tags), self._recipe.data.joiner.join(example.words)

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one padded batch; each gives (tokens, labels)."""
        rows = [document.numpy().astype(np.int32) for document in documents]
        logits = model(**padded(rows, model.config.pad_token_id, max(map(len, rows)))).logits
        return [logits[number, : len(row)] for number, row in enumerate(rows)]
