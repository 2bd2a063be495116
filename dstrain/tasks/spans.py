"""Rows for extractive question answering, and the best spans of their logits: in training and in prediction alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dstrain.data.tokens import DocumentTokenizer
from dstrain.tasks.windows import windows

NO_SPAN = -1e30  # score of a place in the n-best list that nothing fills


@dataclass(frozen=True)
class SpanRow:
    """[CLS] question [SEP] window [SEP]. `offsets` (tokens of the window, 2): characters of the text, last + 1."""

    ids: NDArray[np.int32]
    question: int  # which of the questions
    window_start: int  # place of the window's first token in the row
    offsets: NDArray[np.int64]

    def place(self, start: int, end: int) -> tuple[int, int] | None:
        """Places in the row of the first and last token of the characters start … end; None where not all are in it."""
        if not len(self.offsets) or start < self.offsets[0, 0] or end > self.offsets[-1, 1]:
            return None
        first = int(np.searchsorted(self.offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(self.offsets[:, 0], end, side="left")) - 1
        return (self.window_start + first, self.window_start + last) if first <= last else None


def span_rows(
    encoder: DocumentTokenizer,
    questions: Sequence[tuple[str, str]],
    *,
    length: int,
    stride: int,
    question_length: int,
    separators: int,
) -> list[SpanRow]:
    """The rows of (question, text) pairs; a long text gives several, that share `stride` tokens, or half of their room.

    Args:
        encoder: the tokenizer.
        questions: pairs.
        length: most tokens of a row.
        stride: tokens that neighbouring windows share.
        question_length: most tokens of a question; a longer one loses its end.
        separators: [SEP]s between the two: 1, but 2 for RoBERTa.
    """
    asked = encoder.tokenizer.encode_batch_fast([one for one, _ in questions], add_special_tokens=False)
    texts = encoder.tokenizer.encode_batch([text for _, text in questions], add_special_tokens=False)
    rows = []
    for number, (question, text) in enumerate(zip(asked, texts, strict=True)):
        head = [encoder.cls_id, *question.ids[:question_length], *[encoder.sep_id] * separators]
        room = length - len(head) - 1
        offsets = np.array(text.offsets, np.int64).reshape(-1, 2)
        for window in windows(len(text.ids), room, min(stride, room // 2)):
            ids = np.array([*head, *text.ids[window.start : window.stop], encoder.sep_id], np.int32)
            rows.append(SpanRow(ids, number, len(head), offsets[window.start : window.stop]))
    return rows


def best_spans(
    row: SpanRow, start_logits: NDArray[np.float64], end_logits: NDArray[np.float64], n_best: int, longest: int
) -> tuple[float, list[tuple[int, int, float]]]:
    """The score of no answer (both at [CLS]), and the best spans: first character, last + 1, score; best first.

    Args:
        row: what the logits are of.
        start_logits: (tokens,) or more, padding after them.
        end_logits: the same.
        n_best: how many spans, of as many starts and ends.
        longest: most tokens of a span.
    """
    null = float(start_logits[0] + end_logits[0])
    inside = slice(row.window_start, row.window_start + len(row.offsets))
    starts, ends = start_logits[inside], end_logits[inside]
    spans = [
        (float(starts[first] + ends[last]), int(first), int(last))
        for first in np.argsort(-starts, kind="stable")[:n_best]
        for last in np.argsort(-ends, kind="stable")[:n_best]
        if first <= last < first + longest
    ]
    spans.sort(key=lambda span: (-span[0], span[1], span[2]))
    return null, [(int(row.offsets[a, 0]), int(row.offsets[b, 1]), score) for score, a, b in spans[:n_best]]


def merged(
    windows_of_one: Sequence[tuple[float, list[tuple[int, int, float]]]], n_best: int
) -> tuple[float, list[tuple[int, int, float]]]:
    """The same of a question whose text took several windows: no answer only where no window has one."""
    best: dict[tuple[int, int], float] = {}
    for _, spans in windows_of_one:
        for start, end, score in spans:
            best[start, end] = max(score, best.get((start, end), NO_SPAN))
    ordered = sorted(
        ((start, end, score) for (start, end), score in best.items()), key=lambda span: (-span[2], span[:2])
    )
    return min(null for null, _ in windows_of_one), ordered[:n_best]
