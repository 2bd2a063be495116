"""Prediction: one line out for each line in, the same as Transformers gives, and every bad line named."""

import io
import json
import os
import pty
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer
from dstrain.errors import UserError
from dstrain.predict.command import predict_command, predict_items
from dstrain.predict.items import Item, read_items
from dstrain.predict.load_predictor import load_predictor
from dstrain.predict.loaded import transformers_folder
from dstrain.predict.predictors import TextClassifier

TEXTS = ["red apple", "green leaf of the tree", "the blue sky " * 12, "apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier as Transformers saves it, for texts of 16 tokens at most."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    root: Path = tmp_path_factory.mktemp("classifier")
    write_tokenizer(train_wordpiece(TEXTS * 3, 45), root, lowercase=True)
    tokenizer = AutoTokenizer.from_pretrained(root)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(root)
    labels = {0: "fruit", 1: "plant", 2: "weather"}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=64, max_position_embeddings=40, id2label=labels, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(root)
    return root


def arguments(folder: Path, file: Path, batch_rows: int = 2) -> Namespace:
    return Namespace(model=str(folder), file=str(file), text_field=None, batch_rows=batch_rows)


@pytest.mark.parametrize("batch_rows", [1, 3, 32])
@pytest.mark.slow
def test_predictions_are_those_of_transformers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_rows: int
) -> None:
    from transformers import pipeline

    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert predict_command(arguments(folder, tmp_path / "texts.txt", batch_rows)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    reference = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    expected = reference(TEXTS, truncation=True)
    assert [line["text"] for line in lines] == [text.strip() for text in TEXTS]
    assert [line["label"] for line in lines] == [answer["label"] for answer in expected]
    assert [line["probability"] for line in lines] == pytest.approx([answer["score"] for answer in expected], abs=1e-5)
    assert len({line["label"] for line in lines}) > 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"one\ntwo, three\n"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two, three", "id": 3}\n'),
        ("standard input", b'{"text": "one"}\n{"text": "two, three"}'),
        ("a.csv", b'\xef\xbb\xbfid,text\n1,one\n2,"two, three"\n'),
    ],
)
def test_texts_come_as_lines_json_or_csv(name: str, content: bytes) -> None:
    assert [item.values[0] for item in read_items(io.BytesIO(content), name, ["text"])] == ["one", "two, three"]


def test_nothing_in_gives_nothing_out() -> None:
    assert list(read_items(io.BytesIO(b""), "standard input", ["text"])) == []


def test_bad_lines_are_answered_in_their_place_and_named_at_the_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(
        b'{"text": "red"}\n{"txt": "x"}\nnot json\n["x"]\n{"text": ""}\n{"text": "\xff"}\n{"text": "sky"}\n'
    )
    with pytest.raises(UserError) as error:
        predict_command(arguments(folder, path))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("text") for line in lines] == ["red", None, None, None, None, None, "sky"]
    named = [line["error"] for line in lines if "error" in line]
    assert named == [
        f"{path}:2: has no field 'text'; it has 'txt': --text-field",
        f"{path}:3: not JSON (Expecting value at character 1); write one object a line",
        f"{path}:4: is list, not an object; write one object a line",
        f'{path}:5: text is "", no text to work on',
        f"{path}:6: not UTF-8 (byte 0xff)",
    ]
    assert str(error.value).splitlines() == named


def test_a_csv_without_the_column_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a\.csv:1: has no column 'text' \(--text-field\); its columns are: 'id', 'body'"
    ):
        list(read_items(io.BytesIO(b"id,body\n1,x\n"), "a.csv", ["text"]))


def test_an_empty_line_of_text_is_named() -> None:
    problems = [item.problem for item in read_items(io.BytesIO(b"one\n\ntwo\n"), "a.txt", ["text"])]
    assert problems == [None, "empty, no text to work on", None]


@pytest.mark.slow
def test_a_terminal_shows_how_much_of_the_file_was_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "dstrain", "predict", str(folder), str(tmp_path / "texts.txt")]
    with (tmp_path / "answers.jsonl").open("w") as answers:
        subprocess.run(command, stdout=answers, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # a terminal's way to say that nobody is there any more
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert b"texts.txt" in shown
    assert b"100%" in shown
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(TEXTS)


def test_memory_does_not_grow_with_the_input(folder: Path) -> None:
    """Predictions come out while lines still come in."""
    classifier = TextClassifier(folder)
    taken = 0

    def lines() -> Iterator[Item]:
        nonlocal taken
        for item in read_items(io.BytesIO(b"red\n" * 100), "a.txt", ["text"]):
            taken += 1
            yield item

    answers = predict_items(classifier, lines(), batch_rows=4)
    assert next(answers)["text"] == "red"
    assert taken == 4


def test_a_folder_without_a_classifier_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    with pytest.raises(UserError, match=r"has no config\.json"):
        TextClassifier(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertForMaskedLM without a classification head"):
        TextClassifier(tmp_path)


def test_a_run_stands_for_its_export(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"not exported yet; run: dstrain ckpt export \S+ --out \S+/export"):
        transformers_folder(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    assert transformers_folder(tmp_path) == tmp_path / "export"
    assert transformers_folder(folder) == folder


def test_a_missing_file_and_a_batch_of_nothing_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt: No such file"):
        predict_command(arguments(folder, tmp_path / "absent.txt"))
    with pytest.raises(UserError, match="--batch-rows 0"):
        predict_command(arguments(folder, tmp_path / "absent.txt", batch_rows=0))


def test_a_tagger_finds_entities_in_a_text_and_tags_tokens(folder: Path, tmp_path: Path) -> None:
    """The head is set so that it tags the word `apple` as an entity and nothing else."""
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=64, max_position_embeddings=40, id2label={0: "O", 1: "B-fruit"}, **sizes)
    model = BertForTokenClassification(config)
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.word_embeddings.weight.zero_()[tokenizer("apple").input_ids[1], 0] = 9.0
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        model.classifier.weight.zero_()[1, 0] = 1.0
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    predictor = load_predictor(tmp_path)
    text = "red apple, " + "the blue sky " * 12 + "apple"
    found, tokens = predictor.answers([(text,), (("apple", "of", "apple"),)], 2)
    assert tokens == {"tags": ["B-fruit", "O", "B-fruit"]}
    assert found["entities"] == [
        {"type": "fruit", "text": "apple", "start": 4, "end": 9},
        {"type": "fruit", "text": "apple", "start": len(text) - 5, "end": len(text)},
    ]


def test_a_model_of_two_texts_takes_objects_with_both() -> None:
    lines = b'{"question": "q", "context": "c", "id": 7}\n{"question": "q"}\n'
    first, second = read_items(io.BytesIO(lines), "standard input", ["question", "context"])
    assert (first.values, first.id) == (("q", "c"), 7)
    assert second.problem == "has no field 'context'; add it"
    with pytest.raises(UserError, match="takes question and context; write one JSON object a line with both"):
        read_items(io.BytesIO(b"plain\n"), "standard input", ["question", "context"])


def test_a_model_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing does not exist; give a folder that"):
        load_predictor(tmp_path / "nothing")
