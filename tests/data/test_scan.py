"""Shards as this project and other programs write them, and what must be refused."""

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_support import numbered_corpus

from dstrain.data.scan import scan_shard
from dstrain.data.shards import BadSample, Corpus
from dstrain.data.writer import write_text_shards, write_token_shards
from dstrain.errors import CorpusError


def write_tar(path: Path, files: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def texts_of(path: Path) -> dict[str, str]:
    """Key → text, as the corpus reads it."""
    corpus = Corpus.open(str(path))
    shard = corpus.mapped_shard(0)
    return {shard.keys[document]: shard.text(document, "text") for document in range(corpus.total_documents)}


# ---------------------------------------------------------------- other programs' shards


def test_reads_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as sink:
        for number in range(5):
            sink.write(
                {"__key__": f"sample{number:03d}", "txt": f"text {number} é", "json": {"n": number}, "cls": number}
            )
    assert texts_of(tmp_path / "w.tar") == {f"sample{number:03d}": f"text {number} é" for number in range(5)}


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    write_text_shards(tmp_path / "text", [f"text {number} é\r\n" for number in range(300)], shard_bytes=50_000)
    urls = sorted(str(path) for path in (tmp_path / "text").glob("*.tar"))
    assert len(urls) > 2
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    assert [sample["txt"] for sample in dataset] == [f"text {number} é\r\n" for number in range(300)]

    documents = [np.arange(5, 5 + length) for length in (3, 0, 7)]
    write_token_shards(tmp_path / "tokens", documents, vocab_size=100, tokenizer=None)
    (block,) = webdataset.WebDataset(str(tmp_path / "tokens" / "train-000000.tar"), shardshuffle=False).decode()
    assert block["ends.npy"].tolist() == [3, 3, 10] and block["ids.npy"].dtype == np.uint16
    assert block["ids.npy"].tolist() == np.concatenate(documents).tolist()


@pytest.mark.parametrize("tar_format", ["gnu", "pax", "ustar", "v7"])
def test_reads_gnu_tar(tmp_path: Path, tar_format: str) -> None:
    source = tmp_path / "source"
    names = ["a.txt", "c.txt", "b.txt", "deep/er/d.txt"]
    if tar_format in ("gnu", "pax"):
        names.append("x" * 150 + "/" + "y" * 150 + ".txt")
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"content of {name[-20:]}")
    subprocess.run(["tar", f"--format={tar_format}", "-C", source, "-cf", tmp_path / "g.tar", "."], check=True)
    texts = texts_of(tmp_path / "g.tar")
    assert texts == {"./" + name[: -len(".txt")]: f"content of {name[-20:]}" for name in names}


def test_follows_hard_links_inside_the_tar(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("shared")
    (source / "b.txt").hardlink_to(source / "a.txt")
    subprocess.run(["tar", "-C", source, "-cf", tmp_path / "h.tar", "a.txt", "b.txt"], check=True)
    assert texts_of(tmp_path / "h.tar") == {"a": "shared", "b": "shared"}


def test_groups_files_of_a_sample_wherever_they_stand(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        {
            "one.txt": b"first",
            "two.JSON": b'{"text": "second", "other": "2"}',
            "one.cls": b"7",
            "two.txt": b"plain second",
            "dir.d/three.json": b'{"text": "third"}',
            "dir.d/._three.json": b"AppleDouble",
            "__notes__/x.txt": b"skipped",
            "README": b"no sample",
        },
    )
    assert texts_of(path) == {"one": "first", "two": "second", "dir.d/three": "third"}
    # Without the field, the .txt file of the sample is the text.
    shard = Corpus.open(str(path)).mapped_shard(0)
    assert shard.text(1, "absent") == "plain second"
    with pytest.raises(BadSample, match=r"sample 'dir.d/three': its field 'absent' is missing"):
        shard.text(2, "absent")


def test_bad_samples_are_named(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "b.tar",
        {
            "utf.txt": b"abc\xff",
            "syntax.json": b"{",
            "list.json": b"[1]",
            "number.json": b'{"text": 1}',
            "only.cls": b"1",
            "half.json": b'{"text": "ab\\ud800"}',
            "deep.json": b"[" * 100_000,
            "good.txt": b"",
        },
    )
    shard = Corpus.open(str(path)).mapped_shard(0)
    reasons = {}
    for document in range(7):
        with pytest.raises(BadSample) as error:
            shard.text(document, "text")
        key, reason = str(error.value).split("sample ")[1].split(": ", 1)
        reasons[key.strip("'")] = reason
    assert reasons["utf"] == "not UTF-8 at byte 3 of the text"
    assert reasons["syntax"].startswith("not JSON")
    assert reasons["list"] == "its JSON is not an object with a field 'text'"
    assert reasons["number"] == "its field 'text' is not a text (fields: 'text')"
    assert reasons["only"] == "it has neither a .txt nor a .json file"
    assert reasons["half"] == "half a character (a lone surrogate) at 2 of the text"
    assert reasons["deep"].startswith("not JSON")
    assert shard.text(7, "text") == ""


# ---------------------------------------------------------------- refusals


def good_tar(path: Path) -> bytes:
    return write_tar(path, {f"k{number}.txt": b"x" * 700 for number in range(20)}).read_bytes()


@pytest.mark.parametrize("cut", [1, 511, 512, 700, 1536, 5 * 1536, 5 * 1536 + 512, 20 * 1536])
def test_no_cut_of_a_tar_passes(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(good_tar(path)[:cut])
    with pytest.raises(CorpusError, match=r"t\.tar: (truncated|damaged)"):
        scan_shard(path)


def test_a_damaged_header_does_not_end_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    content = bytearray(good_tar(path))
    content[10 * 1536 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=f"damaged header at byte {10 * 1536}"):
        scan_shard(path)


def test_joined_tars_do_not_lose_the_second(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(good_tar(path) * 2)
    with pytest.raises(CorpusError, match="more data after the end mark"):
        scan_shard(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.tar").touch()
    with pytest.raises(CorpusError, match="an empty file, not a tar"):
        scan_shard(tmp_path / "e.tar")


@pytest.mark.parametrize(("mode", "program"), [("w:gz", "gunzip"), ("w:xz", "unxz"), ("w:bz2", "bunzip2")])
def test_compressed_tars_are_refused_by_content(tmp_path: Path, mode: str, program: str) -> None:
    with tarfile.open(tmp_path / "c.tar", mode) as tar:  # type: ignore[call-overload]  # mypy takes literals alone
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(CorpusError, match=f"compressed, .*decompress it with `{program}`"):
        scan_shard(tmp_path / "c.tar")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"1", "a.TXT": b"2"}, "sample 'a' has a second .txt file, 'a.TXT'"),
        ({"doc-1.2.txt": b"1", "doc-1.3.txt": b"2"}, "sample 'doc-1' has a second .txt file, 'doc-1.3.txt'"),
        ({"a.jpg": b"1", "b.jpg": b"2"}, "none of its 2 samples has a .txt, .json or .ids.npy file"),
        ({"a.ids.npy": npy(np.zeros(2, np.uint16))}, "block 'a' has no .ends.npy file"),
        ({"a.ids.npy": b"junk", "a.ends.npy": npy(np.zeros(0, np.int64))}, "block 'a': not a .npy file"),
        (
            {"a.ids.npy": npy(np.zeros(2, np.float32)), "a.ends.npy": npy(np.array([2]))},
            "block 'a': expected one aligned dimension of uint16 or uint32",
        ),
        (
            {"a.ids.npy": npy(np.zeros(5, np.uint16)), "a.ends.npy": npy(np.array([2, 4]))},
            "block 'a': its ends do not increase up to its 5 ids",
        ),
        (
            {"a.ids.npy": npy(np.zeros(4, np.uint16)), "a.ends.npy": npy(np.array([3, 2, 4]))},
            "block 'a': its ends do not increase up to its 4 ids",
        ),
        (
            {"a.ids.npy": npy(np.zeros(4, np.uint16))[:-1], "a.ends.npy": npy(np.array([4]))},
            "block 'a': its header promises 4 elements",
        ),
        (
            {"a.ids.npy": npy(np.zeros(4, np.uint16)), "a.ends.npy": npy(np.array([4])), "b.txt": b"x"},
            "holds both text samples and token blocks",
        ),
    ],
)
def test_contents_that_cannot_be_trusted(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(CorpusError) as error:
        scan_shard(write_tar(tmp_path / "x.tar", files))
    assert message in str(error.value)


def test_symbolic_links_to_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("elsewhere.txt")
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "l.tar", "a.txt"], check=True)
    with pytest.raises(CorpusError, match=r"'a.txt' is a link to 'elsewhere.txt'"):
        scan_shard(tmp_path / "l.tar")


def test_writing_is_reproducible_to_the_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        numbered_corpus(tmp_path / name, list(range(40)))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) > 4
