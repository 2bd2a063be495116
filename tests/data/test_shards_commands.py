"""`dstrain shards …` as a user types it."""

import gzip
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from data_support import numbered_corpus, sentences, write_small_tokenizer

from dstrain.cli import main
from dstrain.data.check import check_corpus
from dstrain.data.shards import Corpus
from dstrain.data.tokens import load_document_tokenizer


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
        corpus.shard(shard).text(document)
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
        assert (corpus.kind, corpus.total_tokens is not None) == ("tokens", True)
        found[split] = [
            corpus.document(shard, document).astype(np.int32).tobytes()
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


def test_index_counts_the_tokens_of_texts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "", "dog"])
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    assert main(["shards", "build", str(source), "--out", str(tmp_path / "out")]) == 0
    assert Corpus.open(str(tmp_path / "out")).total_tokens is None
    assert main(["shards", "index", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]) == 0
    assert Corpus.open(str(tmp_path / "out")).total_tokens == 7
    assert main(["shards", "check", str(tmp_path / "out")]) == 0


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
