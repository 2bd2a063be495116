"""Questions on a text whose answers are spans of it, as in SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0 (2018)."""

from dataclasses import dataclass
from typing import Any

from dstrain.examples.record import Record
from dstrain.recipe.data import QuestionAnsweringData
from dstrain.tasks.splits import Dropped, Parse, SplitReader, Splits, shown, text_problem


@dataclass(frozen=True)
class Question:
    """A question, the text to answer it from, and its answers, each with its first character, or none."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    line: int
    id: str


def read_questions(data: QuestionAnsweringData) -> tuple[Splits[Question], SplitReader]:
    """The questions of all splits, and the reader that they came through.

    Where a text is scored, an answer that is not at its offset is still an answer. Nothing can be trained towards it:
    from `train` it is dropped, and counted.

    Raises:
        CorpusError: a file cannot be read, or has lines that are no examples.
    """
    fields = ("question_field", "context_field", "answers_field")
    reader = SplitReader(data, {getattr(data, field): f"data.{field}" for field in fields})
    splits = reader.splits(
        _parser(data, trains=True),
        lambda _train: _parser(data, trains=False),
        lambda one: (one.question.strip(), one.context.strip()),
    )
    return splits, reader


def _parser(data: QuestionAnsweringData, *, trains: bool) -> Parse[Question]:
    def parse(record: Record) -> Question | str:
        question, context = record.fields[data.question_field], record.fields[data.context_field]
        for name, text in ((data.question_field, question), (data.context_field, context)):
            problem = text_problem(text, name, data.longest_text)
            if problem:
                return problem
        answers = _answers(record.fields[data.answers_field])
        if answers is None:
            given = shown(record.fields[data.answers_field])
            return f"{data.answers_field} is {given}; write a list of objects with `text` and `answer_start`"
        if record.fields.get("is_impossible") is True:
            answers = ()
        if not answers and not data.unanswerable:
            return "has no answer; set data.unanswerable: true where that is meant (SQuAD 2.0), or drop the question"
        if trains:
            found = tuple((text, start) for text, start in answers if text and context[start:].startswith(text))
            if answers and not found:
                text, start = answers[0]
                return Dropped(
                    f"no answer is where answer_start says; at character {start} is "
                    f"{shown(context[start : start + len(text)])}, not {shown(text)}: correct answer_start"
                )
            answers = found
        return Question(question, context, answers, record.line, str(record.fields.get("id", record.line)))

    return parse


def _answers(value: Any) -> tuple[tuple[str, int], ...] | None:
    """From SQuAD's list of objects, or the object of lists that `datasets` makes of it; None where it is neither."""
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("answer_start"), list):
        pairs = list(zip(value["text"], value["answer_start"], strict=False))
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        pairs = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        return None
    sound = all(isinstance(text, str) and isinstance(start, int) and start >= 0 for text, start in pairs)
    return tuple((str(text), int(start)) for text, start in pairs) if sound else None
