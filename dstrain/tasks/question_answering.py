"""Extractive question answering: where in a text the answer starts and ends, or that it has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from dstrain.architectures import ARCHITECTURES
from dstrain.model.encoder import build_model
from dstrain.recipe.schema import QuestionAnsweringRecipe
from dstrain.tasks.answer_scores import Judged, answer_scores
from dstrain.tasks.batching import padded
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.questions import Question, read_questions
from dstrain.tasks.spans import NO_SPAN, SpanRow, best_spans, merged, span_rows
from dstrain.tasks.splits import SplitReader, Splits

NOWHERE = -100  # target of a row whose answer is known as a text only


@dataclass(frozen=True)
class QuestionRow(Row):
    """A window of a question's text. `target` is where the answer starts and ends, 0 where it is not in the window."""

    span: SpanRow | None = None


class SpanFinder(Head):
    """A Transformers question-answering model. `outputs` are the logits of starts and ends, fp32 (rows, 2, tokens)."""

    def forward(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over rows of the mean loss of start and end, and number of rows that have both right, fp32 scalars.

        Args:
            labels: int64 (rows, 2), `NOWHERE` in rows that have no loss.
            inputs: `input_ids`, `attention_mask` and `token_type_ids`, int64 (rows, tokens).
        """
        found = self.model(**inputs)
        logits = torch.stack([found.start_logits, found.end_logits], dim=1).float()  # (rows, 2, tokens)
        logits = logits.masked_fill(inputs["attention_mask"][:, None] == 0, torch.finfo(torch.float32).min)
        self.outputs = logits.detach()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=NOWHERE, reduction="sum"
        )
        right = (self.outputs.argmax(dim=-1) == labels).all(dim=-1)
        return loss / 2, right.sum(dtype=torch.float32)


class QuestionAnswering(ExampleTask[Question]):
    """The `question_answering` task on one rank."""

    auto_model = AutoModelForQuestionAnswering
    _recipe: QuestionAnsweringRecipe

    def read(self) -> tuple[Splits[Question], SplitReader]:
        """See `ExampleTask`."""
        return read_questions(self._recipe.data)

    def build(self) -> Head:
        """See `ExampleTask`."""
        special_ids, seed = self.encoder.special_token_ids, self._recipe.train.seed
        return SpanFinder(build_model(self._recipe.model, seed, special_ids, auto=self.auto_model, num_labels=2))

    def make_rows(self, split: str, examples: list[Question]) -> list[Row]:
        """See `ExampleTask`: a long text gives several, all but those with the answer towards none."""
        data = self._recipe.data
        spans = span_rows(
            self.encoder,
            [(one.question, one.context) for one in examples],
            length=data.sequence_length,
            stride=data.stride,
            question_length=data.question_length,
            separators=ARCHITECTURES[self._recipe.model.architecture].separators,
        )
        rows: list[Row] = []
        for span in spans:
            target = self._target(examples[span.question], span)
            counts = int(target[0] != NOWHERE)
            size = 1 + 3 * data.n_best
            rows.append(QuestionRow(span.ids, target, span.question, size, counts, span.window_start, span))
        return rows

    @staticmethod
    def _target(question: Question, span: SpanRow) -> Any:
        """int64 (2,): the first answer's first and last token."""
        if not question.answers:
            return np.zeros(2, np.int64)
        text, start = question.answers[0]
        if not question.context[start:].startswith(text):
            return np.full(2, NOWHERE, np.int64)
        return np.array(span.place(start, start + len(text)) or (0, 0), np.int64)

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """See `ExampleTask`."""
        return torch.from_numpy(np.stack([row.target for row in rows]))

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: the score of no answer, then first character, last + 1 and score of the n best spans."""
        data = self._recipe.data
        found = []
        for row, logits in zip(rows, self.module.outputs.cpu().numpy().astype(np.float64), strict=True):
            assert isinstance(row, QuestionRow) and row.span is not None
            null, spans = best_spans(row.span, logits[0], logits[1], data.n_best, data.max_answer_length)
            spans += [(0, 0, NO_SPAN)] * (data.n_best - len(spans))
            found.append(np.array([null, *(number for span in spans for number in span)]))
        return found

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`."""
        data, questions = self._recipe.data, self.splits.named()[split]
        by_question: list[list[tuple[float, list[tuple[int, int, float]]]]] = [[] for _ in questions]
        for row, answer in zip(self.rows[split], answers, strict=True):
            spans = [(int(start), int(end), float(score)) for start, end, score in answer[1:].reshape(-1, 3)]
            by_question[row.example].append((float(answer[0]), spans))
        judged = []
        for question, of_windows in zip(questions, by_question, strict=True):
            null, spans = merged(of_windows, data.n_best)
            start, end, score = spans[0]
            candidates = [(question.context[first:last], own) for first, last, own in spans]
            candidates += [("", null)] if data.unanswerable else []
            true = [text for text, _ in question.answers]
            judged.append(Judged(question.context[start:end], null - score, true, candidates))
        return answer_scores(
            judged, unanswerable=data.unanswerable, threshold=data.null_threshold, language=data.language
        )

    def described(self, example: Question) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        said = ", ".join(repr(text) for text, _ in example.answers) or "no answer"
        return example.line, f"question {example.id}: {said}", f"{example.question} | {example.context}"

    @staticmethod
    def logits_of(outputs: Any) -> Tensor:
        """See `Task`: (rows, tokens, 2)."""
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one padded batch; each gives (tokens, 2)."""
        rows = [document.numpy().astype(np.int32) for document in documents]
        logits = QuestionAnswering.logits_of(model(**padded(rows, model.config.pad_token_id, max(map(len, rows)))))
        return [logits[number, : len(row)] for number, row in enumerate(rows)]
