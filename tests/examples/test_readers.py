"""The same file gives the same records to whoever reads it: training, threshold, predict, the monitor."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dstrain.errors import UserError
from dstrain.examples.records import Reading, records_of
from dstrain.predict.command import opened
from dstrain.predict.items import read_items
from dstrain.predict.monitor import read_in_background

ROWS = [{"id": 1, "text": 'one "1"', "label": "a"}, {"id": 2, "text": "zwei; 二", "label": "b"}]


def csv(path: Path) -> None:
    path.write_text('id,text,label\n1,"one ""1""",a\n2,zwei; 二,b\n', encoding="utf-8-sig")


def semicolons(path: Path) -> None:
    path.write_text('id;text;label\n1;"one ""1""";a\n2;"zwei; 二";b\n')


def tsv(path: Path) -> None:
    path.write_text('id\ttext\tlabel\n1\tone "1"\ta\n2\tzwei; 二\tb\n')


def jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig")


def whole_json(path: Path) -> None:
    path.write_text(json.dumps({"data": ROWS}))


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


FORMATS = {
    "a.csv": csv,
    "b.csv": semicolons,
    "a.tsv": tsv,
    "a.jsonl": jsonl,
    "a.json": whole_json,
    "a.parquet": parquet,
}
Line = tuple[str, str | None, str | None]  # place, text, problem


def of_training(path: Path) -> list[Line]:
    records = records_of(str(path), Reading(), {"text": "--text-field"})
    return [(record.place, record.fields.get("text"), record.problem) for record in records]


def of_predict(path: Path) -> list[Line]:
    with opened(str(path)) as stream:
        items = read_items(stream, str(path), ["text"])
        return [(item.place, item.values[0] if item.values else None, item.problem) for item in items]


def of_monitor(path: Path) -> list[Line]:
    with opened(str(path)) as stream:
        arrived = [each[0] for each in read_in_background(stream, str(path), "text") if each is not None]
    return [(item.place, item.values[0] if item.values else None, item.problem) for item in arrived]


@pytest.mark.parametrize("name", [*FORMATS, *(f"{name}.gz" for name in FORMATS if not name.endswith("parquet"))])
def test_every_reader_sees_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name.removesuffix(".gz")](path)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    lines = of_training(path)
    assert [text for _, text, _ in lines] == [row["text"] for row in ROWS]
    assert of_predict(path) == lines
    assert of_monitor(path) == lines


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"id,text\n1,one,two\n2,two\n"),
        ("a.csv", b'id,text\n1,one\n2,"two\n'),
        ("a.tsv", b"id\ttext\n1\tone\ttwo\n"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n["two"]\n'),
        ("a.json", b'[{"text": "one"}, "two"]'),
    ],
)
def test_every_reader_names_the_same_bad_records(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    lines = of_training(path)
    assert any(problem for *_, problem in lines)
    assert of_predict(path) == lines
    assert of_monitor(path) == lines


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"id,body\n1,one\n"),
        ("a.csv", b"id,text\n1,\xff\n"),
        ("a.json", b'{"text": "one"}'),
        ("a.json", b"[{"),
        ("a.parquet", b"PAR1"),
        ("a.csv.gz", b"text\none\n"),
    ],
)
def test_every_reader_refuses_a_bad_file_in_the_same_words(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    readers: list[Callable[[Path], list[Line]]] = [of_training, of_predict, of_monitor]
    errors = []
    for reader in readers:
        with pytest.raises(UserError) as error:
            reader(path)
        errors.append(str(error.value))
    assert errors[1:] == errors[:1] * 2
