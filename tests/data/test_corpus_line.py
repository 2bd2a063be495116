"""A corpus as a line of tokens: any stretch of it, its bytes, its texts, and the way back to documents."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_support import WORDS, read_only, sentences, write_small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dstrain.data import tokens
from dstrain.data.counts import TokenCounter
from dstrain.data.index import DIGEST_BLOCK_BYTES, read_shard_index
from dstrain.data.locate import locate
from dstrain.data.shards import Corpus
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.data.writer import DEFAULT_SHARD_BYTES, write_text_shards, write_token_shards
from dstrain.errors import CorpusError

GIVEN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def tokenizer(tmp_path: Path) -> DocumentTokenizer:
    return load_document_tokenizer(write_small_tokenizer(tmp_path / "tokenizer"))


def read(corpus: Corpus, first: int, last: int) -> list[int]:
    """Tokens of the line, slice by slice."""
    slices = corpus.slices(first, last)
    assert (slices.length > 0).all()
    return [
        int(token)
        for shard, start, length in zip(slices.shard, slices.start, slices.length, strict=True)
        for token in corpus.shard(int(shard)).read(int(start), int(length))
    ]


@dataclass
class Folders:
    """A new folder for each corpus of a property."""

    parent: Path
    number: int = 0

    def new(self) -> Path:
        self.number += 1
        return self.parent / str(self.number)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "corpora")


def write_documents(
    folder: Path, lengths: Sequence[int], *, shard_bytes: int = DEFAULT_SHARD_BYTES, block_documents: int = 4096
) -> list[NDArray[np.int64]]:
    """Token shards in which no two ids in a row are equal."""
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(start, start + length) % 60_000 for start, length in zip(starts, lengths, strict=False)]
    write_token_shards(
        folder,
        documents,
        vocab_size=60_000,
        tokenizer=None,
        shard_bytes=shard_bytes,
        block_documents=block_documents,
    )
    return documents


# ---------------------------------------------------------------- the line


@GIVEN
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(1, 9), st.integers(100, 4000)), min_size=1, max_size=40),
    shard_bytes=st.sampled_from([1, 3000, 100_000]),
    block_documents=st.integers(1, 12),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=8),
)
def test_slices_are_the_line_of_all_documents(
    folders: Folders,
    lengths: list[int],
    shard_bytes: int,
    block_documents: int,
    cuts: list[tuple[float, float]],
) -> None:
    folder = folders.new()
    documents = write_documents(folder, lengths, shard_bytes=shard_bytes, block_documents=block_documents)
    corpus, line = Corpus.open(str(folder)), np.concatenate(documents).tolist()
    ends = np.cumsum(lengths)
    assert (corpus.total_tokens, corpus.total_documents) == (len(line), len(lengths))
    for cut in [(0.0, 1.0), *cuts]:
        first, last = sorted(int(part * len(line)) for part in cut)
        if first < last:
            assert read(corpus, first, last) == line[first:last]
            inner = np.unique(ends[(ends > first) & (ends < last)]) - first  # where slices end, beside the last
            assert np.cumsum(corpus.slices(first, last).length)[:-1].tolist() == inner.tolist()


WORD = st.sampled_from([*(word for word in WORDS if not word.startswith("#")), "unknown", "x" * 70, "日本"])
SPACE = st.sampled_from([" ", "  ", "\n", "\t \r\n", "\u00a0", "", " " * 60])
TEXT = st.lists(st.tuples(WORD, SPACE), max_size=60).map(lambda parts: "".join(word + space for word, space in parts))


@GIVEN
@given(
    texts=st.lists(TEXT, min_size=1, max_size=12), shard_bytes=st.sampled_from([1, 5000, 100_000]), kind=st.booleans()
)
@pytest.mark.slow
def test_texts_and_their_token_shards_hold_the_same_line(
    folders: Folders, tokenizer: DocumentTokenizer, texts: list[str], shard_bytes: int, kind: bool
) -> None:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(tokens, "SEGMENT_CHARACTERS", 40)
        text_folder, token_folder = folders.new(), folders.new()
        if kind:
            write_text_shards(text_folder, texts, shard_bytes=shard_bytes)
        else:
            write_json_shard(text_folder, texts)
        write_token_shards(token_folder, tokenizer.encode_many(texts), vocab_size=19, tokenizer=tokenizer.digest)
        as_tokens = Corpus.open(str(token_folder), tokenizer=tokenizer)
        line = read(as_tokens, 0, as_tokens.total_tokens) if as_tokens.total_tokens else []
        assert line == [token for text in texts for token in tokenizer.encode(text).tolist()]
        corpus = Corpus.open(str(text_folder), tokenizer=tokenizer)
        assert corpus.total_tokens == len(line)
        for first in range(0, len(line), 7):  # in pieces, so that segments are read in part
            assert read(corpus, first, min(first + 7, len(line))) == line[first : first + 7]
        if line:
            assert read(Corpus.open(str(text_folder), tokenizer=tokenizer), 0, len(line)) == line


def write_json_shard(folder: Path, texts: Sequence[str]) -> Path:
    folder.mkdir(parents=True)
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            content = json.dumps({"text": text, "other": "x"}).encode()
            member = tarfile.TarInfo(f"{number:04d}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@given(text=TEXT, limit=st.integers(2, 50))
def test_segments_cut_no_word_that_can_be_spared(text: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(tokens, "SEGMENT_CHARACTERS", limit)
        parts = list(tokens.segments(text))
    assert "".join(parts) == text and max(map(len, parts)) <= limit
    assert all(parts) or parts == [""]
    for part, following in pairwise(parts):
        if following[0] not in " \t\r\n":
            assert len(part) == limit and not any(space in part[limit // 2 :] for space in " \t\r\n")


def test_a_slice_of_a_giant_document_costs_a_segment(
    folders: Folders, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat sat on mat " * 30_000
    folder = folders.new()
    write_text_shards(folder, ["a", text, "dog"])
    corpus = Corpus.open(str(folder), tokenizer=tokenizer)
    assert corpus.total_tokens == 3 + 150_002 + 3
    ids = tokenizer.encode(text)
    tokenized: list[int] = []
    encode = DocumentTokenizer.encode_segment

    def counted(self: DocumentTokenizer, segment: str) -> NDArray[np.int32]:
        tokenized.append(len(segment))
        return encode(self, segment)

    monkeypatch.setattr(DocumentTokenizer, "encode_segment", counted)
    shard = corpus.shard(0)
    checked: list[int] = []
    check = shard.mapped.check

    def counted_check(first: int, last: int) -> None:
        checked.append(last - first)
        check(first, last)

    monkeypatch.setattr(shard.mapped, "check", counted_check)
    for first in (3, 75_000, 150_004):
        tokenized.clear()
        checked.clear()
        assert read(corpus, first, first + 1) == [ids[first - 3]]
        assert len(tokenized) == 1 and tokenized[0] <= tokens.SEGMENT_CHARACTERS
        assert sum(checked) <= tokens.SEGMENT_CHARACTERS


# ---------------------------------------------------------------- the bytes


@pytest.fixture
def damaged(folders: Folders) -> Callable[[Callable[[bytearray, int], None]], str]:
    """Reads a corpus of large shards after a change of the second one's bytes, and gives the error."""

    def error_of(change: Callable[[bytearray, int], None]) -> str:
        folder = folders.new()
        write_documents(folder, [5000] * 80, shard_bytes=300_000, block_documents=50)
        path = folder / "train-000001.tar"
        content = bytearray(path.read_bytes())
        change(content, int(read_shard_index(path).columns["ids_offset"][0]))
        path.write_bytes(content)
        corpus = Corpus.open(str(folder))
        first_of_shard = corpus.slices(0, corpus.total_tokens)
        first = int(first_of_shard.length[first_of_shard.shard == 0].sum())
        read(corpus, 0, first)
        with pytest.raises(CorpusError) as error:
            read(corpus, first, corpus.total_tokens)
        return str(error.value).replace(str(folder), "FOLDER")

    return error_of


def test_a_flipped_bit_is_found(damaged: Callable[[Callable[[bytearray, int], None]], str]) -> None:
    def flip(content: bytearray, ids: int) -> None:
        content[ids + 131_001] ^= 4

    assert damaged(flip) == (
        "FOLDER/train-000001.tar: block 2 (bytes 131,072 to 196,608) is not what was indexed: the shard is damaged or "
        "was replaced; find such shards with `dstrain shards check FOLDER` and copy them again, or, if the change is "
        "meant, run `dstrain shards index FOLDER`"
    )


def test_thousands_of_flipped_ids_are_found(damaged: Callable[[Callable[[bytearray, int], None]], str]) -> None:
    def swap(content: bytearray, ids: int) -> None:
        content[ids + 6000 : ids + 12_000] = content[ids : ids + 6000]

    assert "train-000001.tar: block 0 (bytes 0 to 65,536) is not what was indexed" in damaged(swap)


def test_ends_are_checked_before_they_are_used(folders: Folders) -> None:
    folder = folders.new()
    write_documents(folder, [5000] * 60, block_documents=60)
    path = folder / "train-000000.tar"
    offset = int(read_shard_index(path).columns["ends_offset"][0])
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    corpus = Corpus.open(str(folder))
    with pytest.raises(CorpusError, match=rf"block {offset // DIGEST_BLOCK_BYTES} .* is not what was indexed"):
        corpus.slices(0, 10)


def test_another_shard_of_the_same_size_is_found(folders: Folders) -> None:
    for kind in ("with the shard's index", "alone"):
        folder, other = folders.new(), folders.new()
        write_documents(folder, [500] * 20)
        write_token_shards(other, [np.full(500, 7)] * 20, vocab_size=60_000, tokenizer=None)
        assert (folder / "train-000000.tar").stat().st_size == (other / "train-000000.tar").stat().st_size
        (other / "train-000000.tar").rename(folder / "train-000000.tar")
        if kind != "alone":
            (other / "train-000000.tar.idx.json").rename(folder / "train-000000.tar.idx.json")
        with pytest.raises(CorpusError, match=r"is not what was indexed|disagree"):
            read(Corpus.open(str(folder)), 0, 10)


def test_a_flipped_bit_of_a_text_is_found(folders: Folders, tokenizer: DocumentTokenizer) -> None:
    folder = folders.new()
    write_text_shards(folder, ["the cat sat " * 10] * 500)
    line = read(Corpus.open(str(folder), tokenizer=tokenizer), 0, 10)
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    place = content.index(b"cat", 300_000)
    content[place : place + 3] = b"dog"  # as many tokens
    path.write_bytes(content)
    corpus = Corpus.open(str(folder), tokenizer=tokenizer)
    assert read(corpus, 0, 10) == line
    with pytest.raises(CorpusError, match=rf"train-000000\.tar: block {place // DIGEST_BLOCK_BYTES} "):
        read(corpus, 0, corpus.total_tokens)


def test_open_shards_are_bounded_in_number_and_memory(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.new()
    documents = write_documents(folder, [50] * 60, shard_bytes=1, block_documents=1)
    line = np.concatenate(documents).tolist()
    corpus = Corpus.open(str(folder))
    corpus.keep_open(0)
    assert read(corpus, 0, len(line)) == line
    assert len(corpus._open) == 16
    one = corpus.shard(0).memory_bytes
    monkeypatch.setattr("dstrain.data.shards.OPEN_BYTES", 3 * one)
    assert read(corpus, 0, len(line)) == line
    assert len(corpus._open) == 3


# ---------------------------------------------------------------- the tokens of texts


def bad_shard(folder: Path) -> Path:
    """Two good samples among three that cannot be read."""
    folder.mkdir(parents=True)
    samples = {"a.txt": b"the cat", "b.txt": b"\xff", "c.json": b"{", "d.txt": b"", "e.json": b"{}", "f.txt": b"dog"}
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def test_bad_samples_stop_or_have_no_tokens(folders: Folders, tokenizer: DocumentTokenizer) -> None:
    folder = bad_shard(folders.new())
    for _ in range(2):  # when they are counted, and when they were
        with pytest.raises(CorpusError) as error:
            Corpus.open(str(folder), tokenizer=tokenizer)
        assert str(error.value) == (
            f"{folder}: 3 samples cannot be read; repair or remove them, or set data.on_bad_sample: skip to go without "
            f"them: {folder}/s.tar: sample 'b': not UTF-8 at byte 0 of the text; {folder}/s.tar: sample 'c': not JSON "
            "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
            f"{folder}/s.tar: sample 'e': its field 'text' is missing (fields: none)"
        )
    with pytest.raises(CorpusError, match=r"3 samples cannot be read, more than data\.max_bad_samples=2"):
        Corpus.open(str(folder), tokenizer=tokenizer, on_bad_sample="skip", max_bad_samples=2)
    corpus = Corpus.open(str(folder), tokenizer=tokenizer, on_bad_sample="skip", max_bad_samples=3)
    assert corpus.bad_sample_count == 3 and corpus.bad_samples[0].endswith("not UTF-8 at byte 0 of the text")
    assert read(corpus, 0, corpus.total_tokens) == [2, 5, 7, 3, 2, 8, 3]


def test_counts_are_of_a_tokenizer_and_a_field(folders: Folders, tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    folder = folders.new()
    write_json_shard(folder, ["the cat", "dog"])
    assert Corpus.open(str(folder), tokenizer=tokenizer).total_tokens == 7
    assert Corpus.open(str(folder), tokenizer=tokenizer, text_field="other").total_tokens == 6
    path = write_small_tokenizer(tmp_path / "other tokenizer") / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"rat"'))
    assert Corpus.open(str(folder), tokenizer=load_document_tokenizer(path.parent)).total_tokens == 7
    assert len(list(folder.glob("*.tokens.json"))) == 3
    digests = {Corpus.open(str(folder), text_field=field).digest for field in ("text", "other")}
    assert len(digests) == 2


def test_counts_are_made_once(folders: Folders, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.new()
    texts = list(sentences(300))
    write_text_shards(folder, texts, shard_bytes=20_000)
    corpus = Corpus.open(str(folder), tokenizer=tokenizer)
    line = read(corpus, 0, corpus.total_tokens)

    with monkeypatch.context() as counted:
        counted.setattr(DocumentTokenizer, "count_segments", refuse_to_count)
        again = Corpus.open(str(folder), tokenizer=tokenizer)
        assert read(again, 0, again.total_tokens) == line
        part = Corpus.open(f"{folder}/train-00000[12].tar", tokenizer=tokenizer)
        assert read(part, 0, 10) == line[_tokens_before(again, 1) :][:10]
        next(folder.glob("tokens.*.json")).write_text("{")  # it is made again from the shards' own
        assert Corpus.open(str(folder), tokenizer=tokenizer).total_tokens == len(line)
    next(folder.glob("train-000001*.tokens.json")).unlink()  # and these from the texts
    again = Corpus.open(str(folder), tokenizer=tokenizer)
    assert read(again, 0, again.total_tokens) == line


def _tokens_before(corpus: Corpus, shard: int) -> int:
    slices = corpus.slices(0, corpus.total_tokens)
    return int(slices.length[slices.shard < shard].sum())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse_to_count(*_: object) -> None:
    raise AssertionError("counted again")


def test_counts_of_a_folder_that_cannot_be_written_are_in_the_cache(
    folders: Folders,
    tokenizer: DocumentTokenizer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folders.new()
    write_text_shards(folder, sentences(200), shard_bytes=20_000)
    expected = [token for text in sentences(200) for token in tokenizer.encode(text).tolist()]
    before = sorted(folder.iterdir())
    with read_only(folder):
        counter = TokenCounter(tokenizer, "text")
        assert counter.known_tokens(locate(str(folder))) is None
        corpus = Corpus.open(str(folder), tokenizer=tokenizer)
        assert read(corpus, 0, corpus.total_tokens) == expected
        monkeypatch.setattr(DocumentTokenizer, "count_segments", refuse_to_count)
        again = Corpus.open(str(folder), tokenizer=tokenizer)
        assert read(again, 0, again.total_tokens) == expected
        assert counter.known_tokens(locate(str(folder))) == len(expected)
        with pytest.raises(AssertionError, match="counted again"):
            Corpus.open(str(folder), tokenizer=tokenizer, text_field="other")
    assert sorted(folder.iterdir()) == before and capsys.readouterr().err == ""
    shards = len(list(folder.glob("*.tar")))
    assert len(list(cache.glob("dstrain/counts/*/??/*.tokens.json"))) == shards > 2
    # The same shards elsewhere are the same shards; and what is damaged is made again.
    copy = folder.rename(folders.new())
    with read_only(copy):
        assert Corpus.open(str(copy), tokenizer=tokenizer).total_tokens == len(expected)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for path in cache.glob("dstrain/counts/**/*.json"):
        path.write_text(path.read_text()[:-9])
    with read_only(copy):
        again = Corpus.open(str(copy), tokenizer=tokenizer)
        assert read(again, 0, again.total_tokens) == expected
        monkeypatch.setattr(DocumentTokenizer, "count_segments", refuse_to_count)
        assert Corpus.open(str(copy), tokenizer=tokenizer).total_tokens == len(expected)


def test_counts_that_cannot_be_kept_anywhere_are_in_memory(
    folders: Folders, tokenizer: DocumentTokenizer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders.new()
    write_text_shards(folder, sentences(50), shard_bytes=10_000)
    cache.mkdir()
    with read_only(folder), read_only(cache):
        for _ in range(2):
            corpus = Corpus.open(str(folder), tokenizer=tokenizer)
            expected = [token for text in sentences(50) for token in tokenizer.encode(text).tolist()]
            assert read(corpus, 0, corpus.total_tokens) == expected
    assert not list(folder.glob("*tokens*")) and not list(cache.iterdir())
    assert capsys.readouterr().err == (
        f"warning: {folder}: neither it nor {cache}/dstrain/counts can be written, so at every start each rank and "
        f"each data process counts the tokens of its texts again; run `dstrain shards index {folder} --tokenizer "
        f"{tokenizer.folder}` on a copy that can be written, or set XDG_CACHE_HOME to a folder that can\n"
    )


def test_a_cache_that_another_library_counted_for_is_removed(
    folders: Folders, tokenizer: DocumentTokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.new()
    write_text_shards(folder, ["the cat", "dog"])
    encode, count = DocumentTokenizer.encode_segment, DocumentTokenizer.count_segments
    with read_only(folder):
        corpus = Corpus.open(str(folder), tokenizer=tokenizer)
        monkeypatch.setattr(DocumentTokenizer, "encode_segment", lambda self, text: encode(self, text + " dog"))
        monkeypatch.setattr(
            DocumentTokenizer, "count_segments", lambda self, texts: count(self, [f"{text} dog" for text in texts])
        )
        with pytest.raises(
            CorpusError, match=r"is not what was counted .* have its tokens counted again with"
        ) as error:
            read(corpus, 0, 1)
        remedy = str(error.value).split("`")[1]
        assert remedy.startswith(f"rm -r {cache}/dstrain/counts/")
        subprocess.run(remedy, shell=True, check=True)
        corpus = Corpus.open(str(folder), tokenizer=tokenizer)
        assert read(corpus, 0, corpus.total_tokens) == [2, 5, 7, 8, 3, 2, 8, 8, 3]


def test_a_text_that_is_tokenized_to_another_number_of_tokens_is_refused(
    folders: Folders, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.new()
    write_text_shards(folder, ["the cat", "dog"])
    corpus = Corpus.open(str(folder), tokenizer=tokenizer)
    encode = DocumentTokenizer.encode_segment
    monkeypatch.setattr(DocumentTokenizer, "encode_segment", lambda self, text: encode(self, text + " dog"))
    with pytest.raises(CorpusError) as error:
        read(corpus, 5, 6)
    assert "sample '000000-00000001' is not what was counted (4 tokens, but 3 were counted)" in str(error.value)
    assert f"run `dstrain shards index {folder} --tokenizer {tokenizer.folder}`" in str(error.value)


COUNT = """
import sys
from dstrain.data.counts import TokenCounter
from dstrain.data.shards import Corpus
from dstrain.data.tokens import load_document_tokenizer

counted, count = [], TokenCounter.count
TokenCounter.count = lambda self, mapped: counted.append(mapped.path.name) or count(self, mapped)
print("ready", flush=True)
sys.stdin.readline()
tokens = Corpus.open(sys.argv[1], tokenizer=load_document_tokenizer(sys.argv[2])).total_tokens
print(tokens, len(counted))
"""


@pytest.mark.parametrize("is_read_only", [False, True])
@pytest.mark.slow
def test_several_processes_share_the_counting(
    folders: Folders, tokenizer: DocumentTokenizer, cache: Path, is_read_only: bool
) -> None:
    folder = folders.new()
    write_text_shards(folder, ["the cat sat on mat " * 2000] * 120, shard_bytes=100_000)
    shards = len(list(folder.glob("*.tar")))
    command = [sys.executable, "-c", COUNT, str(folder), tokenizer.folder]
    with read_only(folder) if is_read_only else nullcontext():
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        results = [list(map(int, process.communicate()[0].split())) for process in processes]
    assert {tokens for tokens, _ in results} == {120 * len(tokenizer.encode("the cat sat on mat " * 2000))}
    counted = sum(count for _, count in results)
    assert shards <= counted < 2 * shards, f"{counted} shards were counted, of {shards}; without sharing 3 times them"
    assert bool(list(folder.glob("*tokens*"))) == (not is_read_only)


# ---------------------------------------------------------------- whose ids they are


def test_token_shards_are_of_the_tokenizer_that_is_used(
    folders: Folders, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    folder = folders.new()
    write_token_shards(folder, [np.array([2, 5, 3])], vocab_size=19, tokenizer=None)
    with pytest.raises(CorpusError) as error:
        Corpus.open(str(folder), tokenizer=tokenizer)
    assert str(error.value) == (
        f"{folder}: which tokenizer made its token ids is not known; if it was {tokenizer.folder}, run `dstrain shards "
        f"index {folder} --tokenizer {tokenizer.folder}`; else build the shards again"
    )
    folder = folders.new()
    write_token_shards(folder, [np.array([2, 5, 3])], vocab_size=19, tokenizer="0" * 64)
    with pytest.raises(CorpusError, match=r"made by another tokenizer \(000000000000…\) than"):
        Corpus.open(str(folder), tokenizer=tokenizer)
    folder = folders.new()
    write_token_shards(folder, [np.array([2, 19, 3])], vocab_size=20, tokenizer=tokenizer.digest)
    with pytest.raises(CorpusError, match=r"holds token id 19, but .* has 19 tokens"):
        Corpus.open(str(folder), tokenizer=tokenizer)


# ---------------------------------------------------------------- back to documents


def test_documents_of_tokens_and_tokens_of_documents(folders: Folders, tokenizer: DocumentTokenizer) -> None:
    texts = [*sentences(60), "", "the dog"]
    text_folder, token_folder = folders.new(), folders.new()
    write_text_shards(text_folder, texts, shard_bytes=15_000)
    write_token_shards(
        token_folder,
        tokenizer.encode_many(texts),
        vocab_size=19,
        tokenizer=tokenizer.digest,
        shard_bytes=2000,
        block_documents=4,
    )
    lengths = [len(tokenizer.encode(text)) for text in texts]
    firsts = np.cumsum([0, *lengths]).tolist()
    for folder in (text_folder, token_folder):
        corpus = Corpus.open(str(folder), tokenizer=tokenizer)
        documents = [(first, length) for first, length in zip(firsts, lengths, strict=False) if length]
        seen = set()
        for token in range(0, corpus.total_tokens, 3):
            slices = corpus.slices(token, token + 1)
            place = corpus.document_of(int(slices.shard[0]), int(slices.start[0]))
            assert (place.first, place.tokens) in documents and 0 <= place.offset < place.tokens
            assert place.first + place.offset == token
            span = (place.first, place.first + place.tokens)
            assert corpus.find(place.shard.name, place.key, place.number) == [span]
            assert corpus.find(str(place.shard), place.key, place.number) == [span]
            assert span in corpus.find(place.shard.name, place.key)
            seen.add((place.shard, place.key, place.number))
        assert len(seen) == len(documents)
        dogs = corpus.find_ids(tokenizer.encode("the dog"))
        assert dogs == [(first, first + 4) for first, text in zip(firsts, texts, strict=False) if text == "the dog"]
        assert corpus.find_ids(tokenizer.encode("")) == corpus.find_ids(tokenizer.encode("dog dog the")) == []
        assert corpus.find("nothing.tar", "x") == corpus.find("train-000000.tar", "x") == []
        assert corpus.find("train-000000.tar", place.key, 1000) == []
