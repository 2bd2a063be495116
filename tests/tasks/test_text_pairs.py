"""Pairs of texts from every format, and what is wrong with them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from labelled import write_examples

from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import CorpusError
from dstrain.recipe.data import SequenceToSequenceData
from dstrain.tasks.batching import encoded
from dstrain.tasks.text_pairs import TextPair, read_text_pairs, written

PAIRS = [("a dog", "ein Hund"), ("two cats", "zwei Katzen")]


def data(train: Path | str, **keys: object) -> SequenceToSequenceData:
    sizes = {
        "sequence_length": 8,
        "target_length": 8,
        "validation_split": 1,
        "source_field": "en",
        "target_field": "de",
    }
    return SequenceToSequenceData(train=str(train), **(sizes | keys))  # type: ignore[arg-type]


def read(train: Path | str, **keys: object) -> list[TextPair]:
    splits, _ = read_text_pairs(data(train, **keys))
    return sorted([*splits.train, *splits.valid], key=lambda pair: pair.line)


def write_parallel(folder: Path, sources: list[str], targets: list[str]) -> str:
    for name, lines in (("en", sources), ("de", targets)):
        (folder / f"train.{name}").write_text("".join(f"{line}\n" for line in lines))
    return f"{folder}/train.{{en,de}}"


def test_every_format_gives_the_same_pairs(tmp_path: Path) -> None:
    records = [{"en": source, "de": target} for source, target in PAIRS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.csv").write_text("en,de\n" + "".join(f"{source},{target}\n" for source, target in PAIRS))
    (tmp_path / "a.tsv").write_text("en\tde\n" + "".join(f"{source}\t{target}\n" for source, target in PAIRS))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    parallel = write_parallel(tmp_path, *map(list, zip(*PAIRS, strict=True)))
    for name in ("en", "de"):
        (tmp_path / f"train.{name}.gz").write_bytes(gzip.compress((tmp_path / f"train.{name}").read_bytes()))
    for path in (*(tmp_path / f"a.{kind}" for kind in ("jsonl", "csv", "tsv", "parquet")), parallel, f"{parallel}.gz"):
        assert [(pair.source, pair.targets) for pair in read(path)] == [(s, (t,)) for s, t in PAIRS], path


def test_sentences_and_references_are_lists(tmp_path: Path) -> None:
    record = {"en": ["First.", "Second."], "de": ["one", "two"]}
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 2)
    pair = read(tmp_path / "a.jsonl")[0]
    assert (pair.source, pair.targets, pair.sentences) == ("First. Second.", ("one", "two"), ("First.", "Second."))


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        (["a", "b", "c"], ["x", "y"], r"train\.en:3: no line 3 in every file \(\S+train\.en 3, \S+train\.de 2\); "),
        (["a", "b"], ["x", ""], r"train\.en:2: de is empty; write the text, or drop the line"),
        (["", "b"], ["x", "y"], r"train\.en:1: en is empty; write the text, or drop the line"),
    ],
)
def test_what_is_wrong_with_parallel_files_is_named(
    tmp_path: Path, sources: list[str], targets: list[str], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        read(write_parallel(tmp_path, sources, targets))


def test_files_of_different_length_are_refused_whatever_is_dropped(tmp_path: Path) -> None:
    """From somewhere on the lines may belong to others; nobody can tell where."""
    with pytest.raises(CorpusError, match="no line 2 in every file"):
        read(write_parallel(tmp_path, ["a", "b"], ["x"]), on_bad_example="drop")


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    parallel = write_parallel(tmp_path, ["a", "b"], ["x", "y"])
    with pytest.raises(CorpusError, match=r"train\.en and its like: has no column 'fr' \(data\.target_field\)"):
        read(parallel, target_field="fr")
    with pytest.raises(CorpusError, match=r"train\.fr: No such file or directory; correct the path"):
        read(parallel.replace("de", "fr"), target_field="fr")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"en": "a", "target": "b"}, "a.jsonl:1: has no field 'de'; add it"),
        ({"en": "a", "de": 3}, "de is 3, neither text nor a list of references; write one of them"),
        ({"en": {"x": 1}, "de": "b"}, "en is {'x': 1}, neither text nor a list of sentences; write one of them"),
        ({"en": "a", "de": []}, "de is empty; write the text"),
        ({"en": "a", "de": ["b", " "]}, "de is empty; write the text"),
        ({"en": "a" * 30, "de": "b"}, "en has 30 characters, more than data.longest_text=20"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(tmp_path: Path, record: dict[str, object], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"en": "a", "de": "b"}) + "\n")
    with pytest.raises(CorpusError) as error:
        read(tmp_path / "a.jsonl", longest_text=20)
    assert message in str(error.value)


def test_a_tokenizer_without_mask_and_beginning_will_do_but_not_one_without_end_or_padding(tmp_path: Path) -> None:
    folder = write_examples(tmp_path) / "tokenizer"
    roles = {"pad_token": "[PAD]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    encoder = load_document_tokenizer(folder, text_to_text=True)
    (ids,) = encoded(encoder, ["red apple"], 8)
    assert (encoder.begin, encoder.mask_id) == ((), None)
    assert ids.tolist() == [*encoder.tokenizer.encode("red apple", add_special_tokens=False).ids, encoder.sep_id]
    with pytest.raises(CorpusError, match="no mask_token"):
        load_document_tokenizer(folder)
    for missing, named in (("eos_token", "sep_token or eos_token"), ("pad_token", "pad_token")):
        left = {role: token for role, token in roles.items() if role != missing}
        (folder / "tokenizer_config.json").write_text(json.dumps(left))
        with pytest.raises(CorpusError, match=f"no {named} in tokenizer_config.json"):
            load_document_tokenizer(folder, text_to_text=True)


def test_ids_become_text_up_to_the_end_of_it(tmp_path: Path) -> None:
    encoder = load_document_tokenizer(write_examples(tmp_path) / "tokenizer", text_to_text=True)
    (ids,) = encoded(encoder, ["red apple"], 8)
    padding = [encoder.pad_id] * 3
    assert written(encoder, np.array([*ids, *padding, *ids], np.int64)) == "red apple"
    assert written(encoder, np.array(padding, np.int64)) == ""


def test_chinese_characters_have_no_spaces_between_them(tmp_path: Path) -> None:
    from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer

    text = "什么是 Base 3?是宏。"
    write_tokenizer(train_wordpiece([text] * 3, 24, lowercase=False), tmp_path, lowercase=False)
    encoder = load_document_tokenizer(tmp_path, text_to_text=True)
    (ids,) = encoded(encoder, [text], 64)
    assert written(encoder, ids.astype(np.int64)) == "什么是 Base 3? 是宏。"
