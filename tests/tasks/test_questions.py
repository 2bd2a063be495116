"""Questions: answers are where they are said to be, spans are found back, and scores follow SQuAD's rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled import write_examples

from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import CorpusError
from dstrain.recipe.data import QuestionAnsweringData
from dstrain.tasks.answer_scores import Judged, answer_scores, exact, f1
from dstrain.tasks.questions import read_questions
from dstrain.tasks.spans import best_spans, merged, span_rows

CONTEXT = "the red apple of the blue sky"
ANY = [("red", 0.0), ("", 0.0)]  # candidates


def write(path: Path, *answers: list[dict[str, Any]]) -> Path:
    questions = [{"id": f"q{n}", "question": f"which {n}", "answers": one} for n, one in enumerate(answers)]
    content = {"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}
    path.write_text(json.dumps(content, indent=1))
    return path


def answer(text: str, start: int) -> dict[str, Any]:
    return {"text": text, "answer_start": start}


def test_answers_that_are_not_at_their_offset_are_dropped_and_reported(tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", [answer("red apple", 4)], [answer("blue", 4)], [answer("sky", 26)])
    valid = write(tmp_path / "valid.json", [answer("blue", 4)])
    splits, reader = read_questions(QuestionAnsweringData(train=str(train), valid=str(valid), sequence_length=16))
    assert [(one.id, one.answers) for one in splits.train] == [("q0", (("red apple", 4),)), ("q2", (("sky", 26),))]
    assert splits.valid[0].answers == (("blue", 4),), "a text is enough to score by"
    line = 1 + next(at for at, text in enumerate(train.read_text().splitlines()) if '"id": "q1"' in text)
    assert reader.notes[:-1] == [
        f"data.train: dropped 1 of 3 examples of {train}",
        "  1 × no answer is where answer_start says",
        f"  the first: {train}:{line} (question q1): no answer is where answer_start says; at character 4 is 'red ', "
        "not 'blue': correct answer_start",
    ]


def test_questions_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", [answer("red", 4)], [])
    section = QuestionAnsweringData(train=str(train), valid=str(train), sequence_length=16)
    with pytest.raises(CorpusError, match=r"\(question q1\): has no answer; set data\.unanswerable: true"):
        read_questions(section)
    splits, _ = read_questions(section.model_copy(update={"unanswerable": True}))
    assert [len(one.answers) for one in splits.train] == [1, 0]
    lists = tmp_path / "lists.jsonl"  # the form of the data set in `datasets`
    record = {"question": "which", "context": CONTEXT, "answers": {"text": ["red"], "answer_start": [4]}}
    lists.write_text(json.dumps(record) + "\n" + json.dumps(record | {"answers": "red"}) + "\n")
    section = QuestionAnsweringData(train=str(lists), valid=str(lists), sequence_length=16)
    with pytest.raises(CorpusError, match=r"lists\.jsonl:2: answers is 'red'; write a list of objects") as error:
        read_questions(section)
    assert len(str(error.value).splitlines()) == 2


def test_a_span_is_found_back_in_every_window_that_holds_it(tmp_path: Path) -> None:
    encoder = load_document_tokenizer(write_examples(tmp_path) / "tokenizer")
    text = " ".join([CONTEXT] * 4)
    rows = span_rows(encoder, [("which colour", text)], length=24, stride=6, question_length=4, separators=1)
    start = text.index("blue sky", 40)
    found = 0
    for row in rows:
        assert len(row.ids) <= 24
        place = row.place(start, start + len("blue sky"))
        if place is None:
            continue
        found += 1
        assert encoder.decode(row.ids[place[0] : place[1] + 1]).replace(" ", "") == "bluesky".replace(" ", "")
        starts, ends = np.zeros((2, 32))
        starts[place[0]], ends[place[1]], starts[0], ends[0] = 5, 4, 1, 2
        null, spans = best_spans(row, starts, ends, n_best=3, longest=8)
        assert (null, spans[0]) == (3.0, (start, start + len("blue sky"), 9.0))
    assert found >= 1
    assert len(rows) > 3
    assert merged([(3.0, [(0, 2, 1.0), (5, 6, 0.5)]), (2.0, [(0, 2, 4.0)])], 1) == (2.0, [(0, 2, 4.0)])


def test_rules_of_squad_and_of_characters() -> None:
    assert exact("The Red-apple!", "redapple", "en") == 1.0
    assert f1("the red apple", "a green apple tree", "en") == pytest.approx(2 * 1 / (2 + 3))
    assert (f1("", "", "en"), f1("", "x", "en"), f1("the", "a", "en")) == (1.0, 0.0, 1.0)
    assert exact("《红楼梦》", "红楼梦", "zh") == 1.0
    assert f1("清代小说红楼梦", "红楼梦", "zh") == pytest.approx(2 * 3 / (7 + 3))
    assert f1("2008 年", "2008年", "zh") == 1.0
    assert f1("iPhone 15", "iphone 16", "zh") == 0.5


def test_scores_with_unanswerable_questions() -> None:
    judged = [
        Judged("red", -2.0, ["red", "the red one"], ANY),  # answered, right
        Judged("blue", 3.0, ["blue"], ANY),  # held for unanswerable, wrongly
        Judged("sky", 5.0, [], ANY),  # rightly
        Judged("leaf", -1.0, [], ANY),  # answered, wrongly
    ]
    scores = answer_scores(judged, unanswerable=True, threshold=0.0, language="en")
    assert [each["badness"] for each in scores["judged"]] == [0.0, 1.0, 0.0, 1.0]
    assert (scores["exact_match"], scores["f1"]) == (0.5, 0.5)
    assert (scores["answerable_f1"], scores["unanswerable_f1"]) == (0.5, 0.5)
    assert (scores["report"]["best_f1"], scores["report"]["best_f1_null_threshold"]) == (0.75, -2.0)
    always = answer_scores(judged[:2], unanswerable=False, threshold=0.0, language="en")
    assert (always["exact_match"], always["f1"]) == (1.0, 1.0)
