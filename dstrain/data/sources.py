"""Reads the texts that shards and tokenizers are made from: JSON lines, plain text files, or shards."""

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO

from dstrain.data.locate import locate_shard
from dstrain.data.mapped import BadSample, MappedShard
from dstrain.data.shards import DEFAULT_TEXT_FIELD
from dstrain.errors import CorpusError

JSON_LINES = (".jsonl", ".jsonl.gz")
READABLE = (*JSON_LINES, ".txt", ".tar")


def source_files(sources: Sequence[str]) -> list[Path]:
    """The files named by `sources`: a file as it is, a folder as all readable files below it, sorted.

    Raises CorpusError for what is missing or cannot be read, and for a folder with files of several kinds.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files.extend(_files_below(path))
        elif not path.is_file():
            raise CorpusError(f"{source}: no such file or folder")
        elif not path.name.endswith(READABLE):
            raise CorpusError(f"{source}: not a kind of file that can be read; give {', '.join(READABLE)}")
        else:
            files.append(path)
    return files


def read_texts(files: Sequence[Path], field: str = DEFAULT_TEXT_FIELD) -> Iterator[str]:
    """All documents: `field` of each JSON line, a .txt file whole, every sample of a text shard.

    Raises CorpusError naming the file and the line or sample that cannot be read.
    """
    for path in files:
        if path.name.endswith(".txt"):
            yield _utf8(path.read_bytes(), str(path))
        elif path.name.endswith(".tar"):
            yield from _shard_texts(path, field)
        else:
            yield from _json_line_texts(path, field)


def _files_below(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(READABLE))
    kinds = {next(kind for kind in READABLE if path.name.endswith(kind)) for path in inside}
    if not kinds:
        raise CorpusError(f"{folder}: no {', '.join(READABLE)} file below it; give the folder of the texts")
    if len(kinds) > 1 and not kinds <= set(JSON_LINES):
        raise CorpusError(f"{folder}: holds {', '.join(sorted(kinds))} files; name the files that are meant")
    return inside


def _json_line_texts(path: Path, field: str) -> Iterator[str]:
    try:
        with closing(_open(path)) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _field_of(line, field, f"{path}:{number}")
    except (OSError, EOFError) as error:  # of the disk, or of a damaged gzip
        raise CorpusError(f"{path}: cannot be read ({error}); copy the file again") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _field_of(line: bytes, field: str, place: str) -> str:
    try:
        content = json.loads(_utf8(line, place))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place}: not JSON ({error}); repair the line") from error
    text = content.get(field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise CorpusError(f"{place}: no text in field {field!r}; repair the line, or name the field with --field")
    return text


def _utf8(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _shard_texts(path: Path, field: str) -> Iterator[str]:
    located = locate_shard(path)
    if located.summary.kind == "tokens":
        raise CorpusError(f"{path}: holds token ids; give the texts that they were made from")
    shard = MappedShard(located)
    for document in range(located.summary.documents):
        try:
            yield shard.text(document, field)
        except BadSample as bad:
            raise CorpusError(f"{bad}; repair or remove the sample, or name the field with --field") from bad
