"""What a smaller model costs: how far its answers are from those of the model that it was made from."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dstrain.errors import UserError
from dstrain.predict.command import opened
from dstrain.predict.items import Item, read_items
from dstrain.predict.predictors import Predictor

BATCH_ROWS = 32
FURTHER = "n_best"  # answers that were not given
NOTHING = object()


def inputs_of(predictor: Predictor, file: str, text_field: str | None = None) -> list[Item]:
    """What a model can be asked of a file, which is read as `dstrain predict` does.

    Raises:
        UserError: it cannot be read, or has nothing in it that the model takes; the first mistake is named.
    """
    fields = (text_field or predictor.fields[0], *predictor.fields[1:])
    with opened(file) as stream:
        items = list(read_items(stream, file, fields, predictor.tokens_field))
    usable = [item for item in items if item.problem is None]
    if not usable:
        why = f"{items[0].place}: {items[0].problem}" if items else "it is empty"
        raise UserError(f"--measure {file} has nothing that the model takes; {why}")
    return usable


def agreement(before: Predictor, after: Predictor, items: Sequence[Item], label_field: str) -> list[str]:
    """In sentences: how often both answer the same, how far their numbers are apart, and accuracies where labels are.

    Numbers are apart by the root mean square of their differences ÷ that of the numbers: for vectors as for scores.

    Args:
        before: a model.
        after: one that was made from it.
        items: what both are asked.
        label_field: of the items, where a classifier's true label is.
    """
    values = [item.values for item in items]
    all_answers = [model.answers(values, BATCH_ROWS) for model in (before, after)]
    first, second = ([_words(answer) for answer in answers] for answers in all_answers)
    lines = []
    if any(answer is not NOTHING for answer in first):
        same = np.mean([one == other for one, other in zip(first, second, strict=True)])
        lines.append(f"int8 answers as fp32 does on {same:.2%} of {len(items):,} inputs")
    pairs = [(list(_numbers(one)), list(_numbers(other))) for one, other in zip(*all_answers, strict=True)]
    if pairs[0][0] and all(len(one) == len(other) for one, other in pairs):
        numbers = np.concatenate([np.array(pair) for pair in pairs], axis=1)
        size, apart = (float(np.sqrt(np.mean(each**2))) for each in (numbers[0], numbers[1] - numbers[0]))
        lines.append(f"its numbers differ by {apart:.2g}, where those of fp32 are {size:.2g} (root mean squares)")
    true = [item.given.get(label_field) for item in items]
    if None not in true and "label" in all_answers[0][0]:
        shares = [
            np.mean([answer["label"] == str(label) for answer, label in zip(answers, true, strict=True)])
            for answers in all_answers
        ]
        lines.append(f"accuracy: fp32 {shares[0]:.4f}, int8 {shares[1]:.4f}")
    return lines


def _words(answer: Any) -> Any:
    """An answer without its fractions; `NOTHING` where nothing else is in it."""
    if isinstance(answer, dict):
        kept = {name: _words(value) for name, value in answer.items() if name != FURTHER}
        kept = {name: value for name, value in kept.items() if value is not NOTHING}
        return kept or NOTHING
    if isinstance(answer, list):
        parts = [_words(value) for value in answer]
        return NOTHING if parts and all(part is NOTHING for part in parts) else parts
    return NOTHING if isinstance(answer, float) else answer


def _numbers(answer: Any) -> Iterator[float]:
    """The fractions in an answer, in order."""
    if isinstance(answer, float):
        yield answer
    elif isinstance(answer, dict):
        for name, value in answer.items():
            if name != FURTHER:
                yield from _numbers(value)
    elif isinstance(answer, list):
        for value in answer:
            yield from _numbers(value)
