import json
from pathlib import Path

import numpy as np
import pytest
from data_support import numbered_corpus

from dstrain.data.index import read_corpus_index, read_shard_index
from dstrain.data.locate import locate
from dstrain.data.shards import Corpus
from dstrain.data.writer import write_text_shards
from dstrain.errors import CorpusError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six token shards of seven documents."""
    folder = tmp_path / "corpus"
    numbered_corpus(folder, list(range(1, 43)), shard_bytes=1024)
    assert len(list(folder.glob("*.tar"))) == 6
    return folder


def drop_indexes(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()


def documents_of(location: str) -> list[list[int]]:
    opened = Corpus.open(location)
    return [
        opened.document(shard, document).tolist()
        for shard, count in enumerate(opened.document_counts)
        for document in range(count)
    ]


def test_documents_are_what_was_written(corpus: Path) -> None:
    assert documents_of(str(corpus)) == [[5 + number] * (number + 1) for number in range(42)]


def test_forms_of_a_location(corpus: Path) -> None:
    everything = documents_of(str(corpus))
    assert documents_of(f"{corpus}/*.tar") == everything
    assert documents_of(f"{corpus}/train-{{000000..000005}}.tar") == everything
    assert documents_of(f"{corpus}/train-00000[12].tar") == everything[7:21]
    assert documents_of(f"{corpus}/train-{{000001,000002}}.tar") == everything[7:21]
    assert documents_of(f"{corpus}/train-000003.tar") == everything[21:28]


def test_an_index_is_made_by_one_scan_and_kept(corpus: Path) -> None:
    before = read_corpus_index(corpus)
    shard_before = read_shard_index(corpus / "train-000002.tar")
    everything = documents_of(str(corpus))
    drop_indexes(corpus)
    assert documents_of(str(corpus)) == everything
    assert read_corpus_index(corpus) == before
    after = read_shard_index(corpus / "train-000002.tar")
    assert after.summary == shard_before.summary and after.keys == shard_before.keys
    for name, values in shard_before.columns.items():
        assert np.array_equal(after.columns[name], values)


def test_a_part_of_a_folder_gets_no_folder_index(corpus: Path) -> None:
    drop_indexes(corpus)
    documents_of(f"{corpus}/train-00000[12].tar")
    assert sorted(path.name for path in corpus.glob("*.json")) == [
        "train-000001.tar.idx.json",
        "train-000002.tar.idx.json",
    ]


def test_a_folder_that_cannot_be_written_keeps_indexes_in_memory(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_indexes(corpus)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("dstrain.data.index.write_json", refuse)
    assert len(documents_of(str(corpus))) == 42
    assert not list(corpus.glob("*.json"))


def test_the_digest_is_of_contents_in_order(corpus: Path, tmp_path: Path) -> None:
    digest = Corpus.open(str(corpus)).digest
    moved = corpus.rename(tmp_path / "elsewhere")
    assert Corpus.open(str(moved)).digest == digest
    assert Corpus.open(f"{moved}/train-{{000001..000005}}.tar").digest != digest
    assert Corpus.open(f"{moved}/train-{{000001,000000,000002,000003,000004,000005}}.tar").digest != digest


def test_text_and_tokens_do_not_mix(corpus: Path, tmp_path: Path) -> None:
    write_text_shards(tmp_path / "text", ["a", "b"])
    with pytest.raises(CorpusError, match="differ in text and token shards"):
        locate(f"{tmp_path}/{{corpus,text}}/train-000000.tar")


# ---------------------------------------------------------------- never silently fewer data


def error_of(location: Path | str) -> str:
    with pytest.raises(CorpusError) as error:
        Corpus.open(str(location))
    return str(error.value)


def test_a_missing_shard(corpus: Path) -> None:
    (corpus / "train-000003.tar").unlink()
    for location in (corpus, f"{corpus}/*.tar", f"{corpus}/train-{{000000..000005}}.tar"):
        assert error_of(location).startswith(
            f"{corpus}/train-000003.tar: the shard is missing (1 in all), though index.json"
        )
    drop_indexes(corpus)
    assert "the shard is missing (1 in all), though the location names it" in error_of(
        f"{corpus}/train-{{000000..000005}}.tar"
    )


def test_a_shard_that_was_cut_or_grew(corpus: Path) -> None:
    path = corpus / "train-000004.tar"
    content = path.read_bytes()
    for changed in (content[:-512], content + b"\0" * 512):
        path.write_bytes(changed)
        assert error_of(corpus).startswith(f"{path}: {len(changed)} bytes, but its index expects {len(content)}")
        (corpus / "index.json").unlink(missing_ok=True)  # its own index says the same


def test_a_shard_that_is_not_in_the_index(corpus: Path) -> None:
    (corpus / "train-000006.tar").write_bytes((corpus / "train-000000.tar").read_bytes())
    assert "train-000006.tar: not in index.json (1 such shards); run `dstrain shards index`" in error_of(corpus)


def test_indexes_that_disagree(corpus: Path) -> None:
    path = corpus / "train-000000.tar.idx.json"
    content = json.loads(path.read_text())
    content["digest"] = "0" * 64
    path.write_text(json.dumps(content))
    opened = Corpus.open(str(corpus))
    with pytest.raises(CorpusError, match=r"train-000000\.tar: its own index and the folder's index.json disagree"):
        opened.document(0, 0)


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 99}', '{"version": 1}'])
def test_damaged_indexes(corpus: Path, damage: str) -> None:
    (corpus / "index.json").write_text(damage)
    assert f"{corpus}/index.json: " in error_of(corpus) and "dstrain shards index" in error_of(corpus)
    (corpus / "index.json").unlink()
    (corpus / "train-000002.tar.idx.json").write_text(damage)
    assert f"{corpus}/train-000002.tar.idx.json: " in error_of(corpus)


def test_an_index_changed_by_hand(corpus: Path) -> None:
    path = corpus / "index.json"
    content = json.loads(path.read_text())
    content["shards"].pop()
    path.write_text(json.dumps(content))
    assert "its digest does not fit its own list of shards" in error_of(corpus)


def test_locations_that_hold_nothing(tmp_path: Path) -> None:
    assert "no .tar shards there" in error_of(tmp_path)
    assert "no .tar shards there" in error_of(tmp_path / "*.tar")
    assert f"there is no folder {tmp_path}/nowhere" in error_of(tmp_path / "nowhere" / "a.tar")
    assert "the shard is missing" in error_of(tmp_path / "nowhere")
    assert "unbalanced braces" in error_of(tmp_path / "{a.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    assert "compressed, so no document can be read by its place" in error_of(tmp_path)
