"""Records of a data file: one mapping of fields each, and the line it starts on. Every format gives the same.

    records_of("train.csv", Reading())  ─►  Record("train.csv:2", {"text": "…", "label": "a"}), …

    .csv .tsv        a header line, or the names in `columns`; a quote means nothing in .tsv
    .jsonl           one object a line
    .json            a list of objects, {"data": [objects]}, or SQuAD's articles, flattened to one question a record
    .parquet         one row a record
    .txt             one text a line, its label before it: `positive What a film`; fields label and text
    .conll           a token a line with its columns, a blank line after each sentence; fields tokens and tags
    train.{en,de}    parallel files, line n of one belonging to line n of the other; fields en and de
    datasets://…     NAME[:CONFIG]#SPLIT, from the local cache of `datasets` or a folder that it saved

A file whose name goes on with .gz is unpacked as it is read. What cannot be read as a record is one with a `problem`.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.errors import CorpusError
from dstrain.examples import formats
from dstrain.examples.record import DATASETS, Record
from dstrain.recipe.data import FILE_FORMATS

PARALLEL = re.compile(r"([^{}]*)\{([^{},]+(?:,[^{},]+)+)\}([^{}]*)")  # train.{en,de}.gz
SUFFIXES = {".ndjson": "jsonl", ".txt": "text", ".iob": "conll", ".bio": "conll", ".conllu": "conll"} | {
    f".{name}": name for name in FILE_FORMATS if name != "text"
}


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        format: one of `FILE_FORMATS`; None goes by the file's name.
        columns: names of the columns of a .csv or .tsv without header.
        encoding: Python's name of a file's encoding.
        token_pattern: a regular expression whose first group is the token, in .conll files that add something to it.
    """

    format: str | None = None
    columns: tuple[str, ...] = ()
    token_pattern: str | None = None
    encoding: str = "utf-8"


_HALF = re.compile("[\ud800-\udfff]")


def half_character(value: Any) -> str | None:
    """What is wrong with a text, or any in a list or object, that JSON's escapes leave half a character in.

    A text cut within an emoji ends like that. It is no Unicode: nothing encodes it, no tokenizer takes it.
    """
    if isinstance(value, str):
        found = None if value.isascii() else _HALF.search(value)
        return found and f"holds half a character, \\u{ord(found[0]):04x}; write the whole one, or take it out"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(half_character, inner)), None)


def records_of(location: str, reading: Reading, needed: Mapping[str, str]) -> Iterator[Record]:
    """The records of a file or of a data set.

    Args:
        location: a path, one with braces for parallel files, or datasets://NAME[:CONFIG]#SPLIT.
        reading: how it is read.
        needed: fields that every record must have, and for each the recipe's key that named it. A header is held to
            them; records are, by whoever uses them.

    Raises:
        CorpusError: it cannot be opened, is no UTF-8, is of no known format, or its header lacks a needed field.
    """
    if location.startswith(DATASETS):
        return formats.datasets_records(location)
    braces = PARALLEL.fullmatch(location)
    if braces is not None:
        before, names, after = braces.groups()
        files = {name: Path(f"{before}{name}{after}") for name in names.split(",")}
        texts = {name: _decoded(path, reading.encoding) for name, path in files.items()}
        return formats.parallel_records(texts, files, needed)
    path = Path(location)
    kind = format_of(path, reading.format)
    if kind == "parquet":
        return formats.parquet_records(path, path, needed)
    return _records_of_text(_decoded(path, reading.encoding), path, kind, reading, needed)


def records_in(content: bytes, path: Path, reading: Reading, needed: Mapping[str, str]) -> Iterator[Record]:
    """The records of a file that was read already, as those of `records_of`. `path`: whose content it is.

    Raises:
        CorpusError: as `records_of`.
    """
    kind = format_of(path, reading.format)
    content = _unpacked(content, path)
    if kind == "parquet":
        return formats.parquet_records(io.BytesIO(content), path, needed)
    return _records_of_text(_text(content, path, reading.encoding), path, kind, reading, needed)


def _records_of_text(
    content: str, path: Path, kind: str, reading: Reading, needed: Mapping[str, str]
) -> Iterator[Record]:
    if kind in ("csv", "tsv"):
        return formats.csv_records(content, path, reading.columns, needed, tabs=kind == "tsv")
    if kind == "conll":
        return formats.conll_records(content, path, reading.token_pattern)
    return {"json": formats.json_records, "jsonl": formats.jsonl_records, "text": formats.text_records}[kind](
        content, path
    )


def format_of(path: Path, given: str | None) -> str:
    """One of `FILE_FORMATS`. Raises CorpusError where neither `given` nor the file's name says it."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    kind = given or (SUFFIXES.get(suffixes[-1]) if suffixes else None)
    if kind is None:
        raise CorpusError(
            f"{path}: its name does not tell its format; set data.format to one of {', '.join(FILE_FORMATS)}"
        )
    return kind


def _decoded(path: Path, encoding: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror or error}; correct the path") from error
    return _text(_unpacked(content, path), path, encoding)


def _unpacked(content: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: not a whole gzip file ({error}); make or copy it again") from error


def _text(content: bytes, path: Path, encoding: str) -> str:
    try:
        return content.decode("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path}:{line}: not {encoding.upper()} (byte 0x{content[error.start]:02x}); convert the file to UTF-8, or "
            f"give its encoding, as in data.encoding=cp1252 (or utf-16, gb18030, …)"
        ) from error
