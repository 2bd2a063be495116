"""Sequence classification: one text or a pair, towards one label, several, or a number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dstrain.architectures import ARCHITECTURES
from dstrain.model.encoder import build_model, labels_of_head
from dstrain.recipe.schema import ClassificationRecipe
from dstrain.tasks.batching import encoded, encoded_pairs, padded
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.examples import Example, read_examples, reader_of
from dstrain.tasks.scores import label_scores, label_set_scores, number_scores
from dstrain.tasks.splits import SplitReader, Splits

PROBLEM_TYPES = {
    "label": "single_label_classification",
    "labels": "multi_label_classification",
    "number": "regression",
}


class Classifier(Head):
    """A Transformers sequence classifier. `outputs` are the logits, fp32 (rows, labels)."""

    def __init__(self, model: PreTrainedModel, weights: Tensor, label_smoothing: float) -> None:
        """`weights`: fp32 (labels,), by which the losses of a label's examples are multiplied."""
        super().__init__(model)
        self.weights, self._label_smoothing = weights, label_smoothing

    def forward(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses and number of right predictions, both fp32 scalars.

        Args:
            labels: int64 (rows,) for one label; fp32 (rows, labels) of zeros and ones for several; fp32 (rows, 1) for
                a number, none of which is ever right.
            inputs: `input_ids`, `attention_mask` and for pairs `token_type_ids`, int64 (rows, tokens).
        """
        logits = self.model(**inputs).logits.float()  # (rows, labels)
        self.outputs = logits.detach()
        problem, weights = self.model.config.problem_type, self.weights.to(logits.device)
        if problem == "regression":
            return nn.functional.mse_loss(logits, labels, reduction="sum"), torch.zeros((), device=logits.device)
        if problem == "multi_label_classification":
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="sum")
            right = ((self.outputs > 0) == (labels > 0)).all(dim=-1)
            return losses / labels.shape[-1], right.sum(dtype=torch.float32)
        each = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self._label_smoothing)
        right = self.outputs.argmax(dim=-1) == labels
        return (each * weights[labels]).sum(), right.sum(dtype=torch.float32)


class SequenceClassification(ExampleTask[Example]):
    """The `sequence_classification` task on one rank."""

    auto_model = AutoModelForSequenceClassification
    _recipe: ClassificationRecipe

    def read(self) -> tuple[Splits[Example], SplitReader]:
        """See `ExampleTask`."""
        reader = reader_of(self._recipe.data)
        found, splits = read_examples(self._recipe.data, reader)
        labels = found if self._recipe.data.target != "number" else ["number"]
        self.counts_right = self._recipe.data.target != "number"
        self.labels = labels_of_head(self._recipe.model, self.auto_model, labels)
        return splits, reader

    def build(self) -> Head:
        """See `ExampleTask`."""
        recipe = self._recipe
        model = build_model(
            recipe.model,
            recipe.train.seed,
            self.encoder.special_token_ids,
            auto=self.auto_model,
            labels=self.labels,
            problem_type=PROBLEM_TYPES[recipe.data.target],
        )
        return Classifier(model, self._class_weights(), recipe.loss.label_smoothing)

    def _class_weights(self) -> Tensor:
        """1 for each label, or what makes labels weigh alike: examples ÷ (labels × examples of it), 1 on average.

        With several labels a text, what makes a label's presence weigh as much as its absence.
        """
        counts = np.zeros(len(self.labels))
        for example in self.splits.train:
            for label in example.labels:
                counts[self.labels.index(label)] += 1
        if self._recipe.loss.class_weights == "none" or self._recipe.data.target == "number":
            weights = np.ones(len(self.labels))
        elif self._recipe.data.target == "labels":
            weights = (len(self.splits.train) - counts) / np.maximum(counts, 1)
        else:
            weights = len(self.splits.train) / (len(self.labels) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32)

    def make_rows(self, split: str, examples: list[Example]) -> list[Row]:
        """See `ExampleTask`: one row an example."""
        length = self._recipe.data.sequence_length
        if self._recipe.data.pair_field is None:
            ids = [
                (row, 0)
                for row in encoded(
                    self.encoder, (example.text for example in examples), length, self._recipe.data.truncation_side
                )
            ]
        else:
            pairs = ((example.text, example.pair or "") for example in examples)
            separators = ARCHITECTURES[self._recipe.model.architecture].separators
            ids = encoded_pairs(self.encoder, pairs, length, separators)
        return [
            Row(row, self._target(example), number, len(self.labels), second_start=second)
            for number, ((row, second), example) in enumerate(zip(ids, examples, strict=True))
        ]

    def notes_on_rows(self) -> list[str]:
        """See `ExampleTask`."""
        length, train = self._recipe.data.sequence_length, self.rows["train"]
        full = sum(len(row.ids) == length for row in train)
        if not full:
            return []
        return [
            f"data.train: {full:,} of {len(train):,} texts fill data.sequence_length={length}; longer ones were cut"
        ]

    def _target(self, example: Example) -> Any:
        """int64 (), fp32 (labels,) or fp32 (1,)."""
        if isinstance(example.target, str):
            return np.int64(self.labels.index(example.target))
        if isinstance(example.target, tuple):
            return np.array([label in example.target for label in self.labels], np.float32)
        return np.array([example.target], np.float32)

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """See `ExampleTask`."""
        return torch.from_numpy(np.stack([row.target for row in rows]))

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: the logits."""
        return list(self.module.outputs.cpu().numpy().astype(np.float64))

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`."""
        logits = np.stack(answers)
        true = np.stack([row.target for row in self.rows[split]])
        if self._recipe.data.target == "number":
            return number_scores(true[:, 0].astype(np.float64), logits[:, 0])
        score = label_scores if self._recipe.data.target == "label" else label_set_scores
        return score(self.labels, true.astype(np.int64), logits)

    def described(self, example: Example) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        text = example.text if example.pair is None else f"{example.text} | {example.pair}"
        kind = "label" if isinstance(example.target, str) else self._recipe.data.target
        return example.line, f"{kind} {example.target!r}", text

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one padded batch; each gives (labels,)."""
        rows = [document.numpy().astype(np.int32) for document in documents]
        return list(model(**padded(rows, model.config.pad_token_id, max(map(len, rows)))).logits)
