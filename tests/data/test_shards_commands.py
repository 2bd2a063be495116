"""`dstrain shards …` as a user types it."""

import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_support import numbered_corpus, sentences, write_small_tokenizer

from dstrain.cli import main
from dstrain.data.check import check_corpus
from dstrain.data.index import ShardIndex, write_shard_index
from dstrain.data.shards import Corpus
from dstrain.data.sources import read_texts, source_files
from dstrain.data.tokens import load_document_tokenizer
from dstrain.data.writer import write_text_shards


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({field: text}) + "\n" for text in texts)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def texts_of(folder: Path) -> list[str]:
    corpus = Corpus.open(str(folder))
    return [
        corpus.mapped_shard(shard).text(document, "text")
        for shard, count in enumerate(corpus.document_counts)
        for document in range(count)
    ]


TEXTS = [*sentences(200), "line one\r\nline two", "", "ünï"]


def test_build_text_shards_from_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS[:50])
    packed = write_jsonl(tmp_path / "b.jsonl.gz", TEXTS[50:100])
    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    for number, text in enumerate(TEXTS[100:]):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    sources = [str(plain), str(packed), str(tmp_path / "folder")]
    assert main(["shards", "build", *sources, "--out", str(tmp_path / "out"), "--shard-mb", "0.02"]) == 0
    assert "203 documents in" in capsys.readouterr().out
    assert texts_of(tmp_path / "out") == TEXTS
    # Shards are a source, too.
    assert main(["shards", "build", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    assert texts_of(tmp_path / "again") == TEXTS


def test_build_token_shards_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[:20], field="body")
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = ["shards", "build", str(source), "--field", "body", "--out", str(out), "--tokenizer", str(tokenizer)]
    assert main([*command, "--valid-fraction", "0.2", "--docs-per-block", "16"]) == 0
    encoder = load_document_tokenizer(tokenizer)
    found: dict[str, list[bytes]] = {}
    for split in ("train", "valid"):
        corpus = Corpus.open(str(out / split))
        assert corpus.tokenizer_digest == encoder.digest
        found[split] = [
            corpus.shard(shard).read_document(document).astype(np.int32).tobytes()
            for shard, count in enumerate(corpus.document_counts)
            for document in range(count)
        ]
    both = sorted(found["train"] + found["valid"])
    assert both == sorted(encoder.encode(text).tobytes() for text in TEXTS + TEXTS[:20])
    assert 20 <= len(found["valid"]) <= 80
    texts = {text: encoder.encode(text).tobytes() for text in TEXTS[:20] if len(text) > 40}
    assert not any(ids in found["train"] and ids in found["valid"] for ids in texts.values()), "copies are never split"


def test_build_refuses_to_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert main(["shards", "build", str(source), "--out", str(tmp_path / "out")]) == 0
    assert main(["shards", "build", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "already holds train-000000.tar; give an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 1}\n', "a.jsonl:2: no text in field 'text'"),
        (b'{"text": "a"}\n{\n', "a.jsonl:2: not JSON"),
        (b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        (b'{"text": "\\ud800"}\n', "a text is not Unicode"),
        (b"\n", "there was no document to write"),
    ],
)
def test_build_names_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert main(["shards", "build", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir()), "nothing half-written stays"


def test_sources_of_several_kinds_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "README.txt").write_text("about")
    assert main(["shards", "build", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds .jsonl, .txt files; name the files that are meant" in capsys.readouterr().err


def test_index_repairs_and_check_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "corpus"
    numbered_corpus(folder, [5] * 42, shard_bytes=1024)
    shards = sorted(folder.glob("*.tar"))
    assert main(["shards", "check", str(folder)]) == 0
    assert f"{len(shards)} shards, 42 documents, 210 tokens: all good" in capsys.readouterr().out

    flipped = bytearray(shards[0].read_bytes())
    flipped[1024 - 128] ^= 1  # a token, so that only the digest tells
    shards[0].write_bytes(flipped)
    shards[1].write_bytes(shards[1].read_bytes()[:1500])
    shards[2].unlink()
    assert main(["shards", "check", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{shards[0]}: its content is not what index.json says" in error
    assert f"{shards[0]}.idx.json: is not the index of this shard" in error
    assert f"{shards[1]}: truncated" in error
    assert f"{shards[2]}: the shard is missing" in error
    assert main(["shards", "check", "--json", str(folder)]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 4

    shards[1].unlink()
    (folder / "index.json").write_text("{")
    assert main(["shards", "index", str(folder)]) == 0
    assert main(["shards", "check", str(folder)]) == 0


def test_check_reads_every_sample(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for name, content in (("a.txt", b"good"), ("b.txt", b"\xff"), ("c.json", b"{}")):
        (source / name).write_bytes(content)
    subprocess.run(["tar", "--sort=name", "-C", source, "-cf", tmp_path / "s.tar", "."], check=True)
    problems = check_corpus(str(tmp_path / "s.tar"), "text").problems
    assert [problem.split(": ", 1)[1].split(";")[0] for problem in problems] == [
        "sample './b': not UTF-8 at byte 0 of the text",
        "sample './c': its field 'text' is missing (fields: none)",
    ]


def test_a_wrong_field_does_not_fill_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(1023):
        (source / f"{number:04d}.json").write_text('{"title": "x", "body": "y"}')
    subprocess.run(["tar", "--sort=name", "-C", source, "-cf", tmp_path / "s.tar", "."], check=True)
    assert main(["shards", "check", str(tmp_path / "s.tar")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {tmp_path / 's.tar'}: 1,023 problems"
    assert "sample './0000': its field 'text' is missing (fields: 'title', 'body')" in lines[1]
    assert lines[-1] == "error: and 1,003 more; --json prints all of them" and len(lines) == 22
    assert main(["shards", "check", str(tmp_path / "s.tar"), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1023
    assert main(["shards", "check", str(tmp_path / "s.tar"), "--field", "body"]) == 0


def test_index_counts_the_tokens_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "", "dog"])
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    assert main(["shards", "build", str(source), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["shards", "index", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]) == 0
    assert capsys.readouterr().out == f"3 documents, 7 tokens in 1 shards indexed in {tmp_path / 'out'}\n"
    assert len(list((tmp_path / "out").glob("*.tokens.json"))) == 1
    assert main(["shards", "check", str(tmp_path / "out")]) == 0


def test_index_lists_what_cannot_be_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for name, content in (("a.txt", b"the cat"), ("b.txt", b"\xff")):
        (source / name).write_bytes(content)
    subprocess.run(["tar", "--sort=name", "-C", source, "-cf", tmp_path / "s.tar", "."], check=True)
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    assert main(["shards", "index", str(tmp_path), "--tokenizer", str(tokenizer)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"2 documents, 4 tokens in 1 shards indexed in {tmp_path}\n"
    assert printed.err == (
        "1 samples cannot be read and have no tokens, among them:\n"
        f"{tmp_path}/s.tar: sample './b': not UTF-8 at byte 0 of the text\n"
    )


def test_index_keeps_the_tokenizer_of_shards_that_did_not_change(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer, out = write_small_tokenizer(tmp_path / "tokenizer"), tmp_path / "out"
    assert main(["shards", "build", str(source), "--out", str(out), "--tokenizer", str(tokenizer)]) == 0
    digest = load_document_tokenizer(tokenizer).digest
    before = (out / "index.json").read_bytes()
    assert main(["shards", "index", str(out)]) == 0
    assert (out / "index.json").read_bytes() == before
    numbered_corpus(tmp_path / "other", [3] * 5)
    (tmp_path / "other" / "train-000000.tar").rename(out / "train-000001.tar")
    assert main(["shards", "index", str(out)]) == 0
    assert Corpus.open(str(out)).tokenizer_digest is None
    assert main(["shards", "index", str(out), "--tokenizer", str(tokenizer)]) == 0
    assert Corpus.open(str(out)).tokenizer_digest == digest


def test_index_refuses_a_tokenizer_that_cannot_have_made_the_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbered_corpus(tmp_path / "corpus", [1] * 100)
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    assert main(["shards", "index", str(tmp_path / "corpus"), "--tokenizer", str(tokenizer)]) == 2
    assert "holds token id 104, but" in capsys.readouterr().err
    assert Corpus.open(str(tmp_path / "corpus")).tokenizer_digest is None


# ---------------------------------------------------------------- builds that do not end well


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    build = ["shards", "build", str(source), "--out", str(out), "--shard-mb", "0.02"]
    written = []

    def fill(shard: Path, index: ShardIndex) -> None:
        written.append(shard)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard_index(shard, index)

    with monkeypatch.context() as full:
        full.setattr("dstrain.data.writer.write_shard_index", fill)
        assert main(build) == 2
    message = f"{out}: cannot be written ([Errno 28] No space left on device); make room, or give another folder"
    assert message in capsys.readouterr().err
    assert len(written) == 3 and not list(out.iterdir())
    assert main(build) == 0
    assert not (out / ".unfinished").exists() and texts_of(out) == TEXTS


def test_a_build_that_was_killed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether in the middle of a shard or between two, with any number of shards whole."""
    out = tmp_path / "out"
    script = (
        "import os, pathlib, sys\n"
        "from dstrain.data.writer import write_text_shards\n"
        "def texts():\n"
        "    yield from ['a' * 5000] * 10\n"
        "    os.kill(os.getpid(), 9)\n"
        "write_text_shards(pathlib.Path(sys.argv[1]), texts(), shard_bytes=10_000)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(out)])
    assert killed.returncode == -9 and len(list(out.glob("*.tar"))) > 2
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for command in (
        ["shards", "check", str(out)],
        ["shards", "index", str(out)],
        ["shards", "cat", f"{out}/train-000000.tar"],
        ["shards", "build", str(out), "--out", str(tmp_path / "copy")],
        ["shards", "build", str(source), "--out", str(out)],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{out}: an unfinished build" in error and f"`rm -r {out}`" in error


def test_many_shards_as_a_source_take_a_look_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one at all of them for each: that was quadratic."""
    write_text_shards(tmp_path / "many", (f"text {number}" for number in range(400)), shard_bytes=1)
    assert len(list((tmp_path / "many").glob("*.tar"))) == 400
    files = source_files([str(tmp_path / "many")])
    listed = []
    scandir = os.scandir

    def counted(folder: str | os.PathLike[str] = ".") -> Iterator[os.DirEntry[str]]:
        listed.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    assert list(read_texts(files)) == [f"text {number}" for number in range(400)]
    assert len(listed) < 5


@pytest.mark.slow
def test_the_memory_of_a_build_does_not_follow_a_giant_document(tmp_path: Path) -> None:
    """Beside the text itself and its ids: tokenizing it at once would take dozens of times its size."""
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    script = (
        "import pathlib, resource, sys\n"
        "from dstrain.data.tokens import load_document_tokenizer\n"
        "from dstrain.data.writer import write_token_shards\n"
        "tokenizer = load_document_tokenizer(sys.argv[1])\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "def build(name, texts):\n"
        "    write_token_shards(pathlib.Path(sys.argv[2]) / name, tokenizer.encode_many(texts), vocab_size=19,\n"
        "                       tokenizer=tokenizer.digest)\n"
        "build('small', ['the cat sat on mat ' * 3000] * 100)\n"
        "before = peak()\n"
        "build('large', ['the cat sat on mat ' * 1_000_000])\n"
        "print(peak() - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tokenizer), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) < 8 * 19_000_000, "of a text of 19 MB"


def test_cat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "dog"])
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    build = ["shards", "build", str(source), "--out"]
    assert main([*build, str(tmp_path / "text")]) == 0
    assert main([*build, str(tmp_path / "tokens"), "--tokenizer", str(tokenizer)]) == 0
    capsys.readouterr()
    assert main(["shards", "cat", str(tmp_path / "text"), "-n", "1"]) == 0
    assert capsys.readouterr().out == "── shard train-000000.tar, document 0, key 000000-00000000\nthe cat\n"
    assert main(["shards", "cat", str(tmp_path / "tokens"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["content"] for line in lines] == [[2, 5, 7, 3], [2, 8, 3]]
    assert main(["shards", "cat", str(tmp_path / "tokens"), "--tokenizer", str(tokenizer), "-n", "1"]) == 0
    assert capsys.readouterr().out.endswith("tokens 4\n[CLS] the cat [SEP]\n")
