"""What may be wrong with a file of examples, for every task: a message that names file, line and remedy."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import CorpusError
from dstrain.predict.items import read_items
from dstrain.recipe.data import (
    ClassificationData,
    QuestionAnsweringData,
    RetrievalData,
    SentenceExtractionData,
    SequenceToSequenceData,
    TokenClassificationData,
)
from dstrain.tasks.examples import read_examples, reader_of
from dstrain.tasks.queries import read_queries
from dstrain.tasks.questions import read_questions
from dstrain.tasks.splits import SplitReader
from dstrain.tasks.tags import read_sentences
from dstrain.tasks.text_pairs import read_text_pairs

Fields = dict[str, Any]
Read = Callable[..., SplitReader]


def classes(**keys: Any) -> SplitReader:
    section = ClassificationData(sequence_length=16, **keys)
    reader = reader_of(section)
    read_examples(section, reader)
    return reader


# By task: what reads it, two good examples, the field that is its text, and what makes a text of that field.
TASKS: dict[str, tuple[Read, list[Fields], str, Callable[[str], Any]]] = {
    "classes": (classes, [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}], "text", str),
    "tags": (
        lambda **keys: read_sentences(TokenClassificationData(sequence_length=16, stride=4, **keys))[2],
        [{"tokens": ["one"], "tags": ["B-a"]}, {"tokens": ["two"], "tags": ["O"]}],
        "tokens",
        lambda text: [text],
    ),
    "questions": (
        lambda **keys: read_questions(QuestionAnsweringData(sequence_length=16, **keys))[1],
        [
            {"question": "which", "context": text, "answers": [{"text": text, "answer_start": 0}]}
            for text in ("one", "two")
        ],
        "context",
        str,
    ),
    "pairs": (
        lambda **keys: read_text_pairs(SequenceToSequenceData(sequence_length=16, target_length=8, **keys))[1],
        [{"source": "one", "target": "eins"}, {"source": "two", "target": "zwei"}],
        "source",
        str,
    ),
    "sentences": (
        lambda **keys: read_text_pairs(SentenceExtractionData(sequence_length=16, **keys))[1],
        [{"source": ["One."], "target": "one"}, {"source": ["Two.", "Three."], "target": ["two"]}],
        "source",
        lambda text: [text],
    ),
    "queries": (
        lambda **keys: read_queries(RetrievalData(sequence_length=16, query_length=8, **keys))[1],
        [{"query": "one", "positive": "first"}, {"query": "two", "positive": "second"}],
        "query",
        str,
    ),
}


def write(path: Path, records: list[Fields]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def refusal(read: Read, **files: str) -> str:
    with pytest.raises(CorpusError) as error:
        read(**files)
    return str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_a_bad_line_is_named_or_dropped_and_counted(tmp_path: Path, task: str) -> None:
    read, (first, second), name, text = TASKS[task]
    train = write(tmp_path / "train.jsonl", [first, second])
    without = {key: value for key, value in second.items() if key != name}
    bad = [
        first | {name: text(" ")},
        without | {f"{name}s": second[name]},
        first | {name: 7},
        first | {name: text("x" * 1_100_000)},
        first | {name: text("half \ud83d")},
    ]
    valid = write(tmp_path / "valid.jsonl", [*bad, first])
    *lines, way_out = refusal(read, train=train, valid=valid).splitlines()
    assert way_out == "data.on_bad_example=drop leaves them out, and counts them"
    assert [line.split(": ")[0] for line in lines] == [f"{valid}:{number}" for number in range(1, 6)]
    empty, missing, number, long, half = (line.partition(": ")[2] for line in lines)
    assert empty.startswith(f"{name} is empty; write the ")
    assert missing == f"has no field '{name}'; did you mean '{name}s'?"
    assert number.startswith(f"{name} is 7, ") and "; " in number
    assert long.startswith(f"{name} has 1,100,000 characters, more than data.longest_text=1000000; ")
    assert half == f"{name} holds half a character, \\ud83d; write the whole one, or take it out"
    reader = read(train=train, valid=valid, on_bad_example="drop")
    assert reader.facts["dropped_from_valid"] == {each.partition(": ")[2].split(";")[0]: 1 for each in lines}
    assert f"data.valid: dropped 5 of 6 examples of {valid}" in reader.notes


@pytest.mark.parametrize("task", TASKS)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, task: str) -> None:
    read, examples, _, _ = TASKS[task]
    train = write(tmp_path / "train.jsonl", examples)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(Path(train).read_bytes() + b'{"text": "caf\xe9"}\n')
    assert refusal(read, train=train, valid=str(broken)).startswith(f"{broken}:3: not UTF-8 (byte 0xe9); convert")
    broken.write_bytes(b"\n\n")
    assert refusal(read, train=train, valid=str(broken)) == f"{broken}: no example in it; give one a line"
    assert "absent.jsonl: No such file" in refusal(read, train=train, valid=str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("task", TASKS)
def test_a_test_set_that_was_trained_on_is_refused_or_told(tmp_path: Path, task: str) -> None:
    read, (first, second), _, _ = TASKS[task]
    train, valid = write(tmp_path / "train.jsonl", [first, second]), write(tmp_path / "valid.jsonl", [first])
    same = write(tmp_path / "test.jsonl", [second, first])
    message = refusal(read, train=train, valid=valid, test=same)
    assert message.startswith(f"data.test={same} has exactly the texts of data.train={train}")
    reader = read(train=train, valid=valid, test=write(tmp_path / "part.jsonl", [second]))
    assert reader.facts["test_texts_also_in_train"] == 1
    assert any(note.startswith("data.test: all of its 1 texts are in the training examples") for note in reader.notes)


def test_a_label_that_was_never_trained_is_named_at_test_time(tmp_path: Path) -> None:
    for task, change in (("classes", {"label": "c"}), ("tags", {"tags": ["B-c"]})):
        read, examples, _, _ = TASKS[task]
        train, valid = (write(tmp_path / name, examples) for name in ("train.jsonl", "valid.jsonl"))
        test = write(tmp_path / "test.jsonl", [examples[0] | change])
        message = refusal(read, train=train, valid=valid, test=test)
        assert message.startswith(f"{test}:1: ") and f"does not occur in {train}" in message
        assert "; " in message


def test_half_a_character_is_no_text_to_predict() -> None:
    lines = rb'{"text": "cut \ud83d"}' + b"\n" + rb'{"text": "whole \ud83d\ude00"}' + b"\n"
    cut, whole = read_items(io.BytesIO(lines), "x.jsonl", ["text"])
    assert cut.problem == "holds half a character, \\ud83d; write the whole one, or take it out"
    assert whole.values == ("whole 😀",)
