"""Labelled texts: one text or a pair, with one label, several, or a number."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dstrain.errors import CorpusError
from dstrain.examples.record import Record
from dstrain.recipe.data import ClassificationData
from dstrain.tasks.splits import Dropped, Parse, SplitReader, Splits, meant, shown, text_problem

LABELS_SHOWN = 5


@dataclass(frozen=True)
class Example:
    """A text, or two, with what it is to be taken for, and the line of its file on which it starts."""

    text: str
    target: str | tuple[str, ...] | float
    line: int
    pair: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Its labels; none where the target is a number."""
        if isinstance(self.target, str):
            return (self.target,)
        return self.target if isinstance(self.target, tuple) else ()


def reader_of(data: ClassificationData) -> SplitReader:
    """What reads the files of a classification recipe."""
    needed = {data.text_field: "data.text_field", data.label_field: "data.label_field"}
    return SplitReader(data, needed | ({data.pair_field: "data.pair_field"} if data.pair_field else {}))


def read_examples(data: ClassificationData, reader: SplitReader) -> tuple[list[str], Splits[Example]]:
    """The labels, in the order of the head's outputs, and the examples of all splits.

    Raises:
        CorpusError: a file cannot be read, has lines that are no examples, or labels that the training file lacks.
    """
    labels = list(data.labels)

    def known(train: list[Example]) -> Parse[Example]:
        if not labels and data.target != "number":
            labels.extend(sorted({label for example in train for label in example.labels}))
            least = 2 if data.target == "label" else 1
            if len(labels) < least:
                raise CorpusError(
                    f"{data.train}: every example has the label {labels[0]!r}; a classifier needs two labels at least "
                    f"(data.label_field={data.label_field})"
                    if labels
                    else f"{data.train}: no example has a label (data.label_field={data.label_field})"
                )
            reader.notes.extend(_doubtful(train))
        return with_known_labels(data, labels, data.train)

    first = with_known_labels(data, labels, "data.labels") if labels else parser(data)
    return labels, reader.splits(first, known, lambda example: (example.text.strip(), example.pair))


def _doubtful(train: list[Example]) -> list[str]:
    """What people should look at among the labels: those that are spelt in two ways, and those of a single example."""
    counts = Counter(label for example in train for label in example.labels)
    spelt: dict[str, list[str]] = {}
    for label in sorted(counts):
        spelt.setdefault(label.casefold(), []).append(label)
    notes = []
    for ways in spelt.values():
        if len(ways) > 1:
            named = " and ".join(f"{label!r} ({counts[label]:,} times)" for label in ways)
            notes.append(f"data.train: the labels {named} differ in case alone, and count as different")
    single = [label for label in sorted(counts) if counts[label] == 1]
    if single and 2 * len(single) <= len(counts):
        shown = ", ".join(repr(label) for label in single[:LABELS_SHOWN])
        more = ", …" if len(single) > LABELS_SHOWN else ""
        notes.append(f"data.train: {len(single):,} of {len(counts):,} labels have one example each: {shown}{more}")
    return notes


def with_known_labels(data: ClassificationData, labels: list[str], source: str) -> Parse[Example]:
    """A parser that takes no label outside of `labels`, which are those of `source`."""
    parse = parser(data)

    def judged(record: Record) -> Example | str:
        found = parse(record)
        for label in () if isinstance(found, str) else found.labels:
            if label not in labels:
                return f"{data.label_field}={label!r} does not occur in {source}" + meant(
                    label, labels, "; did you mean {!r}?", "; add training examples of it, or drop this one"
                )
        return found

    return judged


def parser(data: ClassificationData) -> Parse[Example]:
    """What makes an example of a record, or says what is wrong with it."""
    target_of: Callable[[Any], str | tuple[str, ...] | float | None] = {
        "label": _label,
        "labels": lambda value: _labels(value, data.separator),
        "number": _number,
    }[data.target]
    wanted = {"label": "not one label; write its name", "labels": "no list of labels; write [a, b]"}
    pattern = None if data.label_pattern is None else re.compile(data.label_pattern)
    text_names = [data.text_field] + ([data.pair_field] if data.pair_field else [])

    def parse(record: Record) -> Example | str:
        for name in text_names:
            problem = text_problem(record.fields[name], name, data.longest_text)
            if problem:
                return problem
        value = record.fields[data.label_field]
        target = target_of(value)
        if target is None:
            return f"{data.label_field} is {shown(value)}, {wanted.get(data.target, 'no finite number; write one')}"
        if isinstance(target, str) and not target.strip():
            return f"{data.label_field} is empty; write the label, or drop the line"
        if pattern is not None:
            match = pattern.fullmatch(str(target))
            if match is None:
                return f"{data.label_field} is {shown(value)}; it does not match data.label_pattern={pattern.pattern}"
            target = match[1]
        if target in data.left_out_labels:
            return Dropped(f"{data.label_field} is one of data.left_out_labels; this one is {target!r}")
        pair = record.fields[data.pair_field] if data.pair_field else None
        return Example(record.fields[data.text_field], target, record.line, pair)

    return parse


def _label(value: Any) -> str | None:
    """Labels are text; whole numbers and truth values stand for their text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip() if isinstance(value, str | int) else None


def _labels(value: Any, separator: str) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(separator) if part.strip()]
    labels = [_label(one) for one in value] if isinstance(value, list) else [None]
    return None if None in labels else tuple(dict.fromkeys(label for label in labels if label is not None))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
