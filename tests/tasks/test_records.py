"""Records and examples: every format gives the same, and every mistake is named by file, line and remedy."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.errors import CorpusError
from dstrain.examples.record import Record
from dstrain.examples.records import Reading, records_of
from dstrain.recipe.data import ClassificationData
from dstrain.tasks.examples import Example, read_examples, reader_of
from dstrain.tasks.splits import SplitReader, Splits

ROWS = [{"text": 'He said "no", and\tleft', "label": "a"}, {"text": "好的", "label": "b"}]
WAY_OUT = "data.on_bad_example=drop leaves them out, and counts them"
texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1).filter(
    lambda text: bool(text.strip())
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def data(train: Path, valid: Path | None = None, **keys: Any) -> ClassificationData:
    return ClassificationData(train=str(train), valid=str(valid or train), sequence_length=16, **keys)


def examples(path: Path, **keys: Any) -> list[Example]:
    """Those of one file, whatever their labels."""
    section = data(path, **{"labels": ("a", "b", "y", "z"), **keys})
    return read_examples(section, reader_of(section))[1].train


def read(section: ClassificationData) -> tuple[list[str], Splits[Example], SplitReader]:
    reader = reader_of(section)
    return (*read_examples(section, reader), reader)


def fields(path: Path, **keys: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in records_of(str(path), Reading(**keys), {})]


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=20))
@pytest.mark.slow
def test_csv_and_jsonl_hold_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "note", "text"), *((label, "", text) for text, label in rows)])
    write(folder / "a.jsonl", "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    for name in ("a.csv", "a.jsonl"):
        assert [(row["text"], row["label"]) for row in fields(folder / name)] == rows


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "b.json", json.dumps({"data": ROWS}))
    write(tmp_path / "a.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    write(tmp_path / "a.txt", "__label__a " + ROWS[0]["text"].replace("\t", " ") + "\nb 好的\n")
    write(tmp_path / "a.tsv", 'label\ttext\na\tHe said "no", and left\nb\t好的\n')
    write(tmp_path / "plain.csv", "a,x\nb,y\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    named = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    numbered = [row | {"label": "ab".index(row["label"])} for row in ROWS]
    datasets.Dataset.from_list(numbered, features=named).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.json", "b.json", "a.jsonl.gz", "a.parquet"):
        assert fields(tmp_path / name) == ROWS
    assert [dict(r.fields) for r in records_of(f"datasets://{tmp_path}/saved#train", Reading(), {})] == ROWS
    spaced = [ROWS[0] | {"text": 'He said "no", and left'}, ROWS[1]]
    assert fields(tmp_path / "a.tsv") == fields(tmp_path / "a.txt") == spaced
    assert fields(tmp_path / "plain.csv", columns=("label", "text")) == [
        {"label": "a", "text": "x"},
        {"label": "b", "text": "y"},
    ]


def test_a_list_of_objects_tells_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"data": [\n {"text": "x"},\n\n {"text":\n  "y"}, 3]}')
    assert [record.place.removeprefix(f"{path}:") for record in records_of(str(path), Reading(), {})] == ["2", "4", "5"]


def test_odd_json_is_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"kind": ["data", "x"], "data": [{"text": "x"}, {"text": "y"}]}')
    assert fields(path) == [{"text": "x"}, {"text": "y"}]
    path = write(tmp_path / "b.json", '{"data": [{"paragraphs": [{"qas": [{"id": 1}, 2]}, 3]}, {"title": "t"}, 4]}')
    found = list(records_of(str(path), Reading(), {}))
    assert found[0].fields == {"id": 1}
    assert [record.problem for record in found[1:]] == [
        "int in data, where SQuAD has an object; correct it",
        "int in paragraphs, where SQuAD has an object; correct it",
        "int in qas, where SQuAD has an object; correct it",
        "NoneType in paragraphs, where SQuAD has an object; correct it",
    ]
    with pytest.raises(CorpusError, match=r"c\.json: is dict, not a list of objects"):
        fields(write(tmp_path / "c.json", '{"text": "x"}'))


def test_columns_of_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", "-DOCSTART- O\n\nOn O\nMars NNP B-planet\n\n\n# O\n")
    assert list(records_of(str(path), Reading(), {})) == [
        Record(f"{path}:3", 3, {"tokens": ["On", "Mars"], "tags": ["O", "B-planet"]}),
        Record(f"{path}:7", 7, {"tokens": ["#"], "tags": ["O"]}),
    ]
    path = write(tmp_path / "b.train", "# a comment\n科0\tB-x\n技\tO\n")
    (record,) = records_of(str(path), Reading("conll", token_pattern="(.)[0-9]+"), {})
    assert record.place == f"{path}:2"
    assert record.problem == "line 3: '技' does not match data.token_pattern=(.)[0-9]+"


def test_questions_of_squad_are_records(tmp_path: Path) -> None:
    answers = [{"text": "Mars", "answer_start": 3}]
    question = {"id": "q1", "question": "Where?", "answers": answers}
    paragraph = {"context": "On Mars", "qas": [question, question | {"id": "q2"}]}
    path = write(tmp_path / "dev.json", json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}, indent=0))
    found = list(records_of(str(path), Reading(), {}))
    assert [record.fields for record in found] == [
        {"title": "t", "context": "On Mars", **question},
        {"title": "t", "context": "On Mars", **question, "id": "q2"},
    ]
    lines = path.read_text().splitlines()
    assert [lines[record.line - 1] for record in found] == ['"id": "q1",', '"id": "q2",']


def test_lines_are_those_on_which_an_example_starts(tmp_path: Path) -> None:
    content = '\ufefftext,label\r\n"two\nlines",a\r\n\r\nthree,b\r\n'
    assert examples(write(tmp_path / "a.csv", content)) == [Example("two\nlines", "a", 2), Example("three", "b", 5)]


def test_another_encoding_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n好的,y\n".encode("gb18030"))
    assert examples(path, encoding="gb18030")[0].text == "好的"


def test_numbers_and_truth_values_are_labels_in_json(tmp_path: Path) -> None:
    content = '{"q": "x", "y": 3}\n\n{"q": "x", "y": true}\n{"q": "x", "y": "3"}\n'
    path = write(tmp_path / "a.jsonl", content)
    found = examples(path, text_field="q", label_field="y", labels=("3", "true"))
    assert [example.target for example in found] == ["3", "true", "3"]


def test_pairs_sets_and_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,other,label\nx,y,"a, b,a"\nz,w,\n')
    found = examples(path, target="labels", pair_field="other")
    assert found == [Example("x", ("a", "b"), 2, "y"), Example("z", (), 3, "w")]
    path = write(tmp_path / "b.csv", "text,label\nx,1.5\ny,inf\n")
    with pytest.raises(CorpusError, match=r"b\.csv:3: label is 'inf', no finite number; write one\n"):
        examples(path, target="number", labels=())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "txt,label\nx,y\n",
            "a.csv:1: has no column 'text' (data.text_field); did you mean 'txt'? Then give data.text_field=txt",
        ),
        (
            "a.csv",
            "text,b,c\nx,y,z\n",
            "a.csv:1: has no column 'label' (data.label_field); its columns are: 'text', 'b', 'c'",
        ),
        ("a.csv", "text,label,text\nx,y,z\n", "a.csv:1: the column 'text' is there twice; rename one of them"),
        ("a.csv", "text,label\nx,y\nx,y,z\n", "a.csv:3: has 3 fields, the header has 2; quote fields that hold commas"),
        ("a.tsv", "text\tlabel\nx,y\n", "a.tsv:2: has 1 fields, the header has 2; take tabs out of fields"),
        (
            "a.csv",
            "text,label\n  ,y\nx,\n",
            "a.csv:2: text is empty; write the text, or drop the line\n"
            "@a.csv:3: label is empty; write the label, or drop the line",
        ),
        (
            "a.csv",
            'text,label\nx,y\n"open,y\n',
            "a.csv:3: not CSV (unexpected end of data); quote fields that hold quotes, commas or line ends",
        ),
        (
            "a.csv",
            b"text,label\nx,y\n\xe9,z\n",
            "a.csv:3: not UTF-8 (byte 0xe9); convert the file to UTF-8, or give its encoding, as in "
            "data.encoding=cp1252 (or utf-16, gb18030, …)",
        ),
        ("a.csv", "text,label\n", "a.csv: no example in it; give one a line"),
        ("a.csv", "", "a.csv: no example in it; give one a line"),
        (
            "a.csv",
            f"text,label\n{'x' * 1_000_001},y\n",
            "a.csv:2: text has 1,000,001 characters, more than data.longest_text=1000000; split it, look for a quote "
            "that is never closed, or raise data.longest_text",
        ),
        ("a.jsonl", '{"text": "x", "lable": "y"}\n', "a.jsonl:1: has no field 'label'; did you mean 'lable'?"),
        ("a.jsonl", '{"text": 1, "label": "y"}\n', "a.jsonl:1: text is 1, not text; put it in quotes"),
        ("a.jsonl", '{"text": "x", "label": ["y"]}\n', "a.jsonl:1: label is ['y'], not one label; write its name"),
        (
            "a.jsonl",
            '{"text": "x"\n["x"]\n',
            "a.jsonl:1: not JSON (Expecting ',' delimiter at character 13); write one object a line\n"
            "@a.jsonl:2: is list, not an object; write one object a line",
        ),
        (
            "a.json",
            '{"text": "x"}\n{"text": "y"}\n',
            "a.json:2: not JSON (Extra data at character 1); write one list of objects; where there is one object a "
            "line, name the file .jsonl",
        ),
        (
            "a.labels",
            "",
            "a.labels: its name does not tell its format; set data.format to one of csv, tsv, json, jsonl, parquet, "
            "text, conll",
        ),
        (
            "a.csv.gz",
            b"text,label\n",
            "a.csv.gz: not a whole gzip file (Not a gzipped file (b'te')); make or copy it again",
        ),
    ],
)
def test_every_mistake_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(CorpusError) as error:
        examples(path)
    named = str(error.value).removesuffix(f"\n{WAY_OUT}")  # which files that cannot be read at all do not have
    assert named == f"{tmp_path}/{message}".replace("\n@", f"\n{tmp_path}/")


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + ",y\n" * 30)
    last = (
        r"a\.csv:21: text is empty.*\nand 10 more mistakes; data\.on_bad_example=drop leaves them out, and counts them$"
    )
    with pytest.raises(CorpusError, match=last):
        examples(path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("absent.csv", r"absent\.csv: No such file"),
        ("absent.parquet", r"absent\.parquet: cannot be read as Parquet.*No such file"),
        ("datasets://imdb", r"datasets://imdb: names no split; write datasets://imdb\[:CONFIG\]#train"),
        ("datasets://./absent/x#train", r"datasets://\./absent/x#train: cannot be loaded from this machine"),
    ],
)
def test_what_is_missing_is_named(location: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        list(records_of(location, Reading(), {}))


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\none,b\n,a\ntwo,a\n ,a\nthree,\n")
    valid = write(tmp_path / "valid.csv", "text,label\none,a\ntwo,c\n")
    _, splits, reader = read(data(train, valid, on_bad_example="drop"))
    assert (len(splits.train), len(splits.valid)) == (2, 1)
    assert reader.notes == [
        f"data.train: dropped 3 of 5 examples of {train}",
        "  2 × text is empty",
        "  1 × label is empty",
        f"  the first: {train}:3: text is empty; write the text, or drop the line",
        f"data.valid: dropped 1 of 2 examples of {valid}",
        f"  1 × label='c' does not occur in {train}",
        f"  the first: {valid}:3: label='c' does not occur in {train}; add training examples of it, or drop this one",
        "data.valid: all of its 1 texts are in the training examples too; each makes the score look better than it is",
    ]
    write(train, 'text,label\none,a\ntwo,b\n"three,b\nfour,a\n')
    with pytest.raises(CorpusError, match=r"train\.csv:4: not CSV"):
        read(data(train, valid, on_bad_example="drop"))


def test_labels_come_from_train_and_shared_texts_are_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\none,b\ntwo,a\nthree,b\n")
    valid = write(tmp_path / "valid.csv", "text,label\none,a\none,b\nfour,a\n")
    labels, splits, reader = read(data(train, valid))
    assert (labels, len(splits.train), len(splits.valid)) == (["a", "b"], 3, 3)
    assert reader.facts == {"valid_texts_also_in_train": 1, "valid_texts_alike_in_train": 1}
    with pytest.raises(CorpusError, match=r"data\.test=\S+ has exactly the texts of data\.train"):
        read(data(train, valid, test=str(train)))


def test_held_out_examples_are_drawn_from_train(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(20)))

    def held_out(seed: int, count: float = 5) -> Splits[Example]:
        section = ClassificationData(train=str(train), validation_split=count, sequence_length=16, seed=seed)
        return read(section)[1]

    first = held_out(0)
    assert (len(first.train), len(first.valid)) == (15, 5)
    assert not {example.line for example in first.train} & {example.line for example in first.valid}
    assert held_out(0) == first != held_out(1)
    assert held_out(0, 0.25) == first
    assert len(held_out(0, 0.001).valid) == 1
    with pytest.raises(
        CorpusError, match=r"data\.validation_split=20 takes all of the 20 examples of \S+; use 0\.1 for a tenth"
    ):
        held_out(0, 20)


def test_examples_of_one_author_are_held_out_together(tmp_path: Path) -> None:
    rows = "".join(f"text {n},{n % 2},author {n % 6}\n" for n in range(24))
    train = write(tmp_path / "train.csv", "text,label,author\n" + rows)

    def held_out(count: int, by: str, seed: int = 0) -> tuple[set[str], set[str], SplitReader]:
        section = ClassificationData(
            train=str(train),
            validation_split=count,
            validation_split_by=by,
            sequence_length=16,
            on_bad_example="drop",
            seed=seed,
        )
        _, splits, reader = read(section)
        assert len(splits.train) + len(splits.valid) == 24
        author = {f"text {n}": f"author {n % 6}" for n in range(24)}
        return {author[one.text] for one in splits.train}, {author[one.text] for one in splits.valid}, reader

    for seed in range(3):
        train_authors, valid_authors, reader = held_out(5, "author", seed)
        assert not train_authors & valid_authors
        assert len(valid_authors) == 2  # four texts each, until there are five or more
    assert "data.valid: 8 examples of data.train, whose author no other example has" in reader.notes
    assert held_out(5, "author", 1)[1] != held_out(5, "author", 2)[1]
    with pytest.raises(CorpusError, match=r"takes all examples of \S+: it has only 2 different values there"):
        held_out(13, "label")
    with pytest.raises(
        CorpusError, match=r"has no column 'autor' \(data\.validation_split_by\); did you mean 'author'\?"
    ):
        held_out(5, "autor")


def test_a_table_may_be_separated_by_semicolons(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text;label\n"one; two, three";a\nfour;b\n')
    assert [(one.text, one.target) for one in examples(path)] == [("one; two, three", "a"), ("four", "b")]
    path = write(tmp_path / "b.csv", "text,label;kind\none,a\n")
    with pytest.raises(CorpusError, match="did you mean 'label;kind'"):
        examples(path)


def test_a_label_may_be_a_part_of_its_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\none,a/x.html\ntwo,b/y.html\nthree,z\n")
    found = examples(path, label_pattern="([ab])/.*", on_bad_example="drop")
    assert [(one.text, one.target) for one in found] == [("one", "a"), ("two", "b")]
    with pytest.raises(CorpusError, match=r"a\.csv:4: label is 'z'; it does not match data\.label_pattern="):
        examples(path, label_pattern="([ab])/.*")


def test_labels_that_look_like_mistakes_are_pointed_out(tmp_path: Path) -> None:
    lines = ["one,good", "two,good ", "three,Good", "four,bad", "five,bad", "six,bda"]
    train = write(tmp_path / "train.csv", "text,label\n" + "\n".join(lines) + "\n")
    labels, _, reader = read(data(train, train))
    assert labels == ["Good", "bad", "bda", "good"]
    assert reader.notes[:2] == [
        "data.train: the labels 'Good' (1 times) and 'good' (2 times) differ in case alone, and count as different",
        "data.train: 2 of 4 labels have one example each: 'Good', 'bda'",
    ]


def test_folds_hold_out_each_text_once_and_the_same_texts_together(tmp_path: Path) -> None:
    rows = "".join(f"Text {n % 20},{n % 2}\n" if n < 20 else f" text  {n % 20} ,{n % 2}\n" for n in range(30))
    train = write(tmp_path / "train.csv", "text,label\n" + rows)

    def fold(number: int, seed: int = 0, folds: int = 3, **keys: Any) -> tuple[set[int], SplitReader]:
        section = ClassificationData(
            train=str(train), folds=folds, fold=number, sequence_length=16, split_seed=seed, seed=number, **keys
        )
        _, splits, reader = read(section)
        assert len(splits.train) + len(splits.valid) == 30
        return {one.line for one in splits.valid}, reader

    parts = [fold(number)[0] for number in range(3)]
    assert set.union(*parts) == set(range(2, 32)) and sum(map(len, parts)) == 30
    assert parts == [fold(number)[0] for number in range(3)] != [fold(number, 1)[0] for number in range(3)]
    assert all((line in part) == (line + 20 in part) for part in parts for line in range(2, 12))
    assert fold(0)[1].facts["valid_texts_alike_in_train"] == 0
    (first, _), (second, _) = (
        fold(0, folds=2, validation_split_by="label"),
        fold(1, folds=2, validation_split_by="label"),
    )
    assert {line % 2 for line in first} != {line % 2 for line in second}
    with pytest.raises(CorpusError, match=r"data\.folds=21, and \S+ has 20 texts; use at most that"):
        fold(0, folds=21)


def test_texts_that_splits_share_are_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\none two,a\nthree,b\nfour,a\nsix,b\n")
    valid = write(tmp_path / "valid.csv", "text,label\nOne  TWO,a\nthree,b\nfive,a\n")
    test = write(tmp_path / "test.csv", "text,label\nFOUR,a\nfive,b\n")
    reader = read(data(train, valid, test=str(test)))[2]
    assert reader.facts == {
        "valid_texts_also_in_train": 1,
        "valid_texts_alike_in_train": 2,
        "test_texts_also_in_train": 0,
        "test_texts_alike_in_train": 1,
    }
    assert reader.notes == [
        "data.valid: 2 of its 3 texts are in the training examples too (1 exactly, the rest but for case and spaces); "
        "each makes the score look better than it is",
        "data.test: 1 of its 2 texts are in the training examples too (0 exactly, the rest but for case and spaces); "
        "each makes the score look better than it is",
        "data.test: 1 of its 2 texts are in data.valid too; early stopping and the best checkpoint were chosen by them",
    ]
    same = write(tmp_path / "same.csv", "text,label\nFour,a\nONE two,b\n three,b\nsix,a\n")
    with pytest.raises(CorpusError, match=r"has exactly the texts of data\.train"):
        read(data(train, valid, test=str(same)))


def test_a_label_that_train_lacks_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\none,positive\ntwo,negative\n")
    valid = write(tmp_path / "valid.csv", "text,label\none,positive\ntwo,negativ\nthree,42\n")
    with pytest.raises(CorpusError) as error:
        read(data(train, valid))
    assert str(error.value).splitlines() == [
        f"{valid}:3: label='negativ' does not occur in {train}; did you mean 'negative'?",
        f"{valid}:4: label='42' does not occur in {train}; add training examples of it, or drop this one",
        WAY_OUT,
    ]


def test_a_single_label_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\none,a\ntwo,a\n")
    with pytest.raises(CorpusError, match="every example has the label 'a'"):
        read(data(train))
