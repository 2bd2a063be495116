import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_support import numbered_corpus, read_only

from dstrain.data.index import ShardIndex, read_shard_index, write_shard_index
from dstrain.data.locate import locate, locate_indexed
from dstrain.data.scan import scan_shard
from dstrain.data.shards import Corpus
from dstrain.data.user_cache import user_cache
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
    corpus = Corpus.open(location)
    return [
        corpus.shard(shard).read_document(document).tolist()
        for shard, count in enumerate(corpus.document_counts.tolist())
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
    assert documents_of(f"{corpus}/train-00000{{1,[23]}}.tar") == everything[7:28]
    assert documents_of(f"{corpus}/train-000003.tar") == everything[21:28]


def test_what_is_indexed_is_known_without_a_scan(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered_corpus(tmp_path / "other", [3] * 14, shard_bytes=1024)
    monkeypatch.delattr("dstrain.data.locate.scan_shard")
    both = f"{tmp_path}/{{other,corpus}}/*.tar"
    located = locate_indexed(both)
    assert located is not None and located.table.documents.sum() == 14 + 42
    (tmp_path / "other" / "index.json").unlink()
    assert locate_indexed(both) is locate_indexed(f"{tmp_path}/other/train-{{000000..000099}}.tar") is None


def test_shards_of_several_folders_are_one_line(corpus: Path, tmp_path: Path) -> None:
    numbered_corpus(tmp_path / "other", [3] * 14, shard_bytes=1024)
    (tmp_path / "other" / "train-000000.tar.idx.json").unlink()
    (tmp_path / "other" / "index.json").unlink()
    both = f"{tmp_path}/{{other,corpus}}/train-00000[01].tar"
    expected = documents_of(str(tmp_path / "other")) + documents_of(str(corpus))[:14]
    assert documents_of(both) == expected
    assert Corpus.open(both).shard_path(2) == corpus / "train-000000.tar"


def test_an_index_is_made_by_one_scan_and_kept(corpus: Path) -> None:
    before = (corpus / "index.json").read_bytes()
    shard_before = read_shard_index(corpus / "train-000002.tar")
    everything = documents_of(str(corpus))
    drop_indexes(corpus)
    assert documents_of(str(corpus)) == everything
    assert (corpus / "index.json").read_bytes() == before
    after = read_shard_index(corpus / "train-000002.tar")
    assert after.summary == shard_before.summary and after.keys == shard_before.keys
    for name, values in shard_before.columns.items():
        assert np.array_equal(after.columns[name], values)


def test_a_part_of_a_folder_gets_no_folder_index(corpus: Path) -> None:
    drop_indexes(corpus)
    documents_of(f"{corpus}/train-00000[12].tar")
    indexes = ["train-000001.tar.idx.json", "train-000002.tar.idx.json"]
    assert sorted(path.name for path in corpus.glob("*.json")) == indexes


def test_indexes_of_a_folder_that_cannot_be_written_are_in_the_cache(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drop_indexes(corpus)
    scanned: list[Path] = []

    def counted(shard: Path) -> ShardIndex:
        scanned.append(shard)
        return scan_shard(shard)

    monkeypatch.setattr("dstrain.data.locate.scan_shard", counted)
    part = f"{corpus}/train-00000[12].tar"
    with read_only(corpus):
        everything = documents_of(str(corpus))
        assert len(everything) == 42 and len(scanned) == 6
        assert locate_indexed(part) is None, "of which nobody has asked yet"
        for _ in range(2):
            assert documents_of(str(corpus)) == everything and documents_of(part) == everything[7:21]
        assert len(scanned) == 6
        whole, two = locate_indexed(str(corpus)), locate_indexed(part)
        assert whole is not None and two is not None and (len(whole), len(two)) == (6, 2)
        # A shard of another content is another shard, though its size and its time are the same.
        path = corpus / "train-000001.tar"
        content, status = path.read_bytes(), path.stat()
        path.write_bytes(content.replace(np.int16(5 + 10).tobytes(), np.int16(5).tobytes()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert documents_of(part)[3] == [5] * 11 and scanned[6:] == [path]
        for index in (tmp_path / "cache").glob("dstrain/indexes/**/*.json"):
            index.write_text("{")
        assert documents_of(part)[3] == [5] * 11 and len(scanned) == 9
    assert not list(corpus.glob("*.json"))


def test_indexes_that_cannot_be_kept_anywhere_are_in_memory(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("not a folder")
    drop_indexes(corpus)
    with read_only(corpus):
        assert len(documents_of(str(corpus))) == len(documents_of(str(corpus))) == 42
    assert not list(corpus.glob("*.json"))
    assert capsys.readouterr().err == (
        f"warning: {corpus}: neither it nor {tmp_path}/cache/dstrain/indexes can be written, so at every start each "
        f"rank and each data process reads its shards from end to end; run `dstrain shards index {corpus}` on a copy "
        "that can be written, or set XDG_CACHE_HOME to a folder that can\n"
    )


@pytest.mark.parametrize(
    ("cache_home", "home", "expected"),
    [
        ("/x", "/home/a", "/x/dstrain/counts"),
        ("x", "/home/a", "/home/a/.cache/dstrain/counts"),
        (None, "/home/a", "/home/a/.cache/dstrain/counts"),
    ],
)
def test_where_the_cache_is(cache_home: str | None, home: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    if cache_home is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    assert user_cache("counts") == Path(expected)


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


def test_a_shard_that_was_cut_or_grew_is_refused_where_it_is_opened(corpus: Path) -> None:
    path = corpus / "train-000004.tar"
    content = path.read_bytes()
    for changed in (content[:-512], content + b"\0" * 512, b""):
        path.write_bytes(changed)
        with pytest.raises(CorpusError) as error:
            documents_of(str(corpus))
        assert str(error.value).startswith(f"{path}: {len(changed)} bytes, but its index expects {len(content)}")
        assert f"`dstrain shards check {corpus}`" in str(error.value)
        (corpus / "index.json").unlink(missing_ok=True)  # its own index says the same


def test_the_sizes_of_a_smaller_corpus_are_compared(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located = locate(str(corpus))
    located.check_sizes()
    path = corpus / "train-000004.tar"
    content = path.read_bytes()
    remedy = (
        f"find such shards with `dstrain shards check {corpus}` and copy them again, or, if the change is meant, run "
        f"`dstrain shards index {corpus}`"
    )
    path.write_bytes(content[:-512])
    (corpus / "train-000005.tar").write_bytes(b"")
    with pytest.raises(CorpusError) as error:
        located.check_sizes()
    assert str(error.value) == (
        f"{path}: {len(content) - 512} bytes, but its index expects {len(content)}: the shard is truncated or was "
        f"changed after indexing; {remedy}"
    )
    locate(f"{corpus}/train-00000[0-3].tar").check_sizes()
    path.unlink()
    with pytest.raises(CorpusError, match=r"train-000004\.tar: cannot be read .*No such file.*dstrain shards check"):
        located.check_sizes()
    monkeypatch.setattr("dstrain.data.locate.SIZES_COMPARED", 5)
    located.check_sizes()  # of six shards, none is looked at


def test_a_folder_is_opened_without_a_look_at_its_shards(corpus: Path) -> None:
    for path in corpus.glob("*.tar"):
        path.unlink()
        path.symlink_to("nowhere")
    opened = Corpus.open(str(corpus))
    assert opened.total_tokens == sum(range(1, 43))
    with pytest.raises(CorpusError, match=r"train-000000\.tar: cannot be read .*No such file"):
        opened.slices(0, 10)


def test_a_shard_that_is_not_in_the_index(corpus: Path) -> None:
    (corpus / "train-000006.tar").write_bytes((corpus / "train-000000.tar").read_bytes())
    message = f"train-000006.tar: not in index.json (1 such shards); run `dstrain shards index {corpus}` to take it in"
    assert message in error_of(corpus)


def test_indexes_that_disagree(corpus: Path) -> None:
    shard = corpus / "train-000000.tar"
    index = read_shard_index(shard)
    write_shard_index(shard, replace(index, summary=replace(index.summary, digest="0" * 32)))
    opened = Corpus.open(str(corpus))
    with pytest.raises(CorpusError, match=r"train-000000\.tar: its own index and the folder's index.json disagree"):
        opened.slices(0, 1)


def test_a_shard_is_renamed_together_with_its_index(corpus: Path) -> None:
    everything = documents_of(str(corpus))
    (corpus / "index.json").unlink()
    for end in (".tar", ".tar.idx.json"):
        (corpus / f"train-000000{end}").rename(corpus / f"a{end}")
    assert documents_of(str(corpus)) == everything


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 99}', '{"version":3,"check":"' + "0" * 32 + '",'])
def test_damaged_indexes(corpus: Path, damage: str) -> None:
    remedy = f"run `dstrain shards index {corpus}`"
    (corpus / "index.json").write_text(damage)
    assert error_of(corpus).startswith(f"{corpus}/index.json: ") and remedy in error_of(corpus)
    (corpus / "index.json").unlink()
    (corpus / "train-000002.tar.idx.json").write_text(damage)
    assert error_of(corpus).startswith(f"{corpus}/train-000002.tar.idx.json: ") and remedy in error_of(corpus)


def test_an_index_changed_by_hand(corpus: Path) -> None:
    for name, old, new in (
        ("index.json", '"tokenizer":null', '"tokenizer":"x"'),
        ("train-000000.tar.idx.json", '"documents":7', '"documents":6'),
    ):
        path = corpus / name
        content = path.read_text()
        assert old in content and json.loads(content)
        path.write_text(content.replace(old, new))
        with pytest.raises(CorpusError, match=rf"{name}: .*it does not fit its own digest.*dstrain shards index"):
            documents_of(str(corpus))
        path.write_text(content)


def test_an_index_of_version_1_is_refused(corpus: Path) -> None:
    for tokenizer, rest in ((None, "`"), ("x", "`, with --tokenizer and the tokenizer's folder")):
        (corpus / "index.json").write_text(json.dumps({"version": 1, "tokenizer": tokenizer, "shards": []}))
        message = "an index of version 1, which cannot check the bytes that are read; run `dstrain shards index "
        assert error_of(corpus) == f"{corpus}/index.json: {message}{corpus}{rest}"


def test_an_unfinished_build_is_refused(corpus: Path) -> None:
    (corpus / ".unfinished").touch()
    for location in (str(corpus), f"{corpus}/train-00000[12].tar", f"{corpus}/train-{{000001,000002}}.tar"):
        assert error_of(location).startswith(f"{corpus}: an unfinished build")
        assert f"`rm -r {corpus}`" in error_of(location)


def test_locations_that_hold_nothing(tmp_path: Path) -> None:
    assert "no .tar shards there" in error_of(tmp_path)
    assert "no .tar shards there" in error_of(tmp_path / "*.tar")
    assert f"there is no folder {tmp_path}/nowhere" in error_of(tmp_path / "nowhere" / "a.tar")
    assert "the shard is missing" in error_of(tmp_path / "nowhere")
    assert "unbalanced braces" in error_of(tmp_path / "{a.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    assert "compressed, so no document can be read by its place" in error_of(tmp_path)


def test_a_shard_is_named_once(corpus: Path) -> None:
    for location in (f"{corpus}/train-{{000001,000001}}.tar", f"{corpus}/train-{{000001,00000*}}.tar"):
        assert error_of(location).startswith(f"{location}: names a shard twice")
