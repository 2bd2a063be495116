"""One function for each file format that `records_of` knows."""

import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dstrain.base.json_reader import JsonError, parse_json
from dstrain.errors import CorpusError
from dstrain.examples.record import DATASETS, Record
from dstrain.recipe.messages import nearest

CSV_REMEDY = "quote fields that hold quotes, commas or line ends"
COLUMN_SHOWN = 40  # characters


class _Tabs(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def csv_records(
    content: str, path: Path, columns: tuple[str, ...], needed: Mapping[str, str], *, tabs: bool
) -> Iterator[Record]:
    """Lines of a table. In tab-separated ones a tab ends a field and a quote is a character like any other.

    Others may be separated by semicolons, as spreadsheets do where the comma is in numbers: if their header says so.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses long documents
    dialect = _Tabs if tabs else csv.excel
    first = content.partition("\n")[0].strip("\r")
    delimiter = "\t" if tabs else ";" if "," not in first and first.count(";") else ","
    lines = csv.reader(io.StringIO(content, newline=""), dialect, strict=True, delimiter=delimiter)
    header = list(columns) or None
    if header:
        _require_columns(header, f"{path}", needed)
    while True:
        number = lines.line_num + 1
        place = f"{path}:{number}"
        try:
            values = next(lines)
        except StopIteration:
            return
        except csv.Error as error:  # what follows an open quote cannot be told apart
            yield Record(place, number, problem=f"not CSV ({error}); {CSV_REMEDY}", fatal=True)
            return
        if header is None:
            header = values
            _require_columns(header, place, needed)
        elif len(values) == len(header):
            yield Record(place, number, dict(zip(header, values, strict=True)))
        elif values:
            remedy = "take tabs out of fields" if tabs else "quote fields that hold commas"
            named = "data.columns" if columns else "the header"
            problem = f"has {len(values)} fields, {named} has {len(header)}; {remedy}"
            yield Record(place, number, problem=problem)


def _require_columns(header: list[str], place: str, needed: Mapping[str, str]) -> None:
    mistakes = [f"the column {name!r} is there twice; rename one of them" for name in needed if header.count(name) > 1]
    for name, key in needed.items():
        if name not in header:
            close = nearest(name, header)
            columns = ", ".join(repr(column[:COLUMN_SHOWN]) for column in header)
            meant = f"did you mean {close!r}? Then give {key}={close}" if close else f"its columns are: {columns}"
            mistakes.append(f"has no column {name!r} ({key}); {meant}")
    if len(mistakes) > 1:
        mistakes.append(
            "give the names of the columns, as in data.label_field=class; without a header, data.columns=[text,label]"
        )
    if mistakes:
        raise CorpusError("\n".join(f"{place}: {mistake}" for mistake in mistakes))


def parquet_records(source: Path | BinaryIO, path: Path, needed: Mapping[str, str]) -> Iterator[Record]:
    """Rows of a Parquet file, numbered from 1. `path`: where the source is from."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source)
        _require_columns(file.schema_arrow.names, str(path), needed)
        number = 0
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}: row {number}", number, fields)
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{path}: cannot be read as Parquet: {error}; make or copy it again") from error


def jsonl_records(content: str, path: Path) -> Iterator[Record]:
    """One object a line; blank lines are skipped."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        yield jsonl_record(line, f"{path}", number)


def jsonl_record(line: str | bytes, name: str, number: int) -> Record:
    """What a line of JSON holds; bytes are UTF-8. `name` and `number` say where it is from."""
    place = f"{name}:{number}"
    if isinstance(line, bytes):
        try:
            line = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Record(place, number, problem=f"not UTF-8 (byte 0x{line[error.start]:02x})")
    try:
        value = parse_json(line.rstrip("\r\n"), name, line=number, strict=False)
    except JsonError as error:
        return Record(place, number, problem=f"{error.problem}; write one object a line")
    return _object(value, place, number, "write one object a line")


def json_records(content: str, path: Path) -> Iterator[Record]:
    """The objects of a list, of a list under `data`, or the questions of SQuAD's articles."""
    decoder = json.JSONDecoder()
    try:
        value = decoder.decode(content)
    except json.JSONDecodeError as error:
        remedy = "write one list of objects; where there is one object a line, name the file .jsonl"
        raise CorpusError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at character {error.colno}); {remedy}"
        ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        articles = value["data"]
        if articles and isinstance(articles[0], dict) and "paragraphs" in articles[0]:
            yield from _squad_questions(articles, content, path)
            return
        value, start = articles, content.find("[", content.find('"data"'))
    elif isinstance(value, list):
        start = content.find("[")
    else:
        raise CorpusError(
            f'{path}: is {_kind(value)}, not a list of objects; write [{{…}}, …] or {{"data": [{{…}}, …]}}'
        )
    position, number = start + 1, content.count("\n", 0, start + 1) + 1
    for element in value:  # decoded once more, which tells on which line each one starts
        begin = re.compile(r"[\s,]*").match(content, position).end()  # type: ignore[union-attr]
        number += content.count("\n", position, begin)
        yield _object(element, f"{path}:{number}", number, "write a list of objects")
        with contextlib.suppress(json.JSONDecodeError):  # where another "data" came first, lines are not to be told
            _, position = decoder.raw_decode(content, begin)
            number += content.count("\n", begin, position)


def _object(value: Any, place: str, number: int, remedy: str) -> Record:
    if isinstance(value, dict):
        return Record(place, number, value)
    return Record(place, number, problem=f"is {_kind(value)}, not an object; {remedy}")


def _kind(value: Any) -> str:
    return type(value).__name__


def _squad_questions(articles: list[Any], content: str, path: Path) -> Iterator[Record]:
    """https://rajpurkar.github.io/SQuAD-explorer: articles of paragraphs of questions, which share a context."""
    position, number = 0, 1
    odd: list[str] = []
    for article in _dictionaries({"data": articles}, "data", odd):
        for paragraph in _dictionaries(article, "paragraphs", odd):
            for question in _dictionaries(paragraph, "qas", odd):
                found = content.find(json.dumps(question.get("id"), ensure_ascii=False), position)
                if found >= 0:
                    number += content.count("\n", position, found)
                    position = found
                place = f"{path}:{number} (question {question.get('id')})"
                shared = {"title": article["title"]} if "title" in article else {}
                shared |= {"context": paragraph["context"]} if "context" in paragraph else {}
                yield Record(place, number, shared | question)
    for sentence in odd:
        yield Record(str(path), 1, problem=sentence)


def _dictionaries(holder: dict[str, Any], key: str, odd: list[str]) -> list[dict[str, Any]]:
    """The objects in a list of SQuAD's; what is something else is put into words in `odd`."""
    found = holder.get(key)
    listed = found if isinstance(found, list) else [found]
    odd += [
        f"{_kind(one)} in {key}, where SQuAD has an object; correct it" for one in listed if not isinstance(one, dict)
    ]
    return [one for one in listed if isinstance(one, dict)]


def text_records(content: str, path: Path) -> Iterator[Record]:
    """A label and its text a line, with fastText's `__label__` before the label or without."""
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            label, _, text = line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
            yield Record(f"{path}:{number}", number, {"label": label.removeprefix("__label__"), "text": text.strip()})


def parallel_records(
    texts: Mapping[str, str], files: Mapping[str, Path], needed: Mapping[str, str]
) -> Iterator[Record]:
    """Line n of every file, under the file's name: translations of each other, say. Blank lines are kept.

    Args:
        texts: content by name.
        files: where it is from.
        needed: as in `records_of`.
    """
    named = next(iter(files.values()))
    _require_columns(list(texts), f"{named} and its like", needed)
    lines = {name: text.removesuffix("\n").split("\n") if text else [] for name, text in texts.items()}
    counts = {name: len(each) for name, each in lines.items()}
    shortest = min(counts.values())
    for number in range(1, shortest + 1):
        fields = {name: each[number - 1].rstrip("\r") for name, each in lines.items()}
        yield Record(f"{named}:{number}", number, fields)
    if max(counts.values()) > shortest:
        sizes = ", ".join(f"{files[name]} {count:,}" for name, count in counts.items())
        problem = f"no line {shortest + 1} in every file ({sizes}); parallel files have a line for each other's lines"
        yield Record(f"{named}:{shortest + 1}", shortest + 1, problem=problem, fatal=True)


def conll_records(content: str, path: Path, token_pattern: str | None) -> Iterator[Record]:
    """Sentences of a column file: the first column is the token, the last its tag, whatever is between.

    Columns are separated by tabs where the file has any, by spaces otherwise. -DOCSTART- lines, and comments in files
    with tabs, are skipped.
    """
    tabs = "\t" in content
    pattern = None if token_pattern is None else re.compile(token_pattern)
    tokens: list[str] = []
    tags: list[str] = []
    start, problem = 1, None
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        parts = [part.strip(" ") for part in line.strip("\r\n").split("\t")] if tabs else line.split()
        if not line.strip() or parts[0] == "-DOCSTART-":
            if tokens or problem:
                yield Record(f"{path}:{start}", start, {"tokens": tokens, "tags": tags}, problem)
            tokens, tags, problem = [], [], None
            continue
        if not tokens and problem is None:
            start = number
        if tabs and len(parts) == 1 and line.startswith("#"):
            continue
        match = pattern.fullmatch(parts[0]) if pattern else None
        if len(parts) < 2 or not parts[0] or not parts[-1]:
            problem = problem or f"line {number} has no token with a tag; write a token, a tab and its tag"
        elif pattern and match is None:
            problem = problem or f"line {number}: {parts[0]!r} does not match data.token_pattern={token_pattern}"
        else:
            tokens.append(match[1] if match else parts[0])
            tags.append(parts[-1])


def datasets_records(location: str) -> Iterator[Record]:
    """Rows of a data set that is on this machine, numbered from 1; class numbers become the names of their classes."""
    import datasets

    name, _, split = location.removeprefix(DATASETS).partition("#")
    if not name or not split:
        raise CorpusError(f"{location}: names no split; write {DATASETS}{name or 'NAME'}[:CONFIG]#train")
    try:
        if Path(name).is_dir() and any(Path(name).glob("*state.json")):
            rows = datasets.load_from_disk(name)
        elif Path(name).is_dir() and any(Path(name).glob("dataset_dict.json")):
            rows = datasets.load_from_disk(name)[split]
        else:
            path, _, config = name.partition(":")
            rows = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # of many kinds: the hub's, fsspec's, the library's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = f"load it once with datasets.load_dataset({name!r}) where there is a network, or give a saved folder"
        raise CorpusError(f"{location}: cannot be loaded from this machine ({reason}); {remedy}") from error
    named = {key: _class_names(feature) for key, feature in rows.features.items()}
    for number, row in enumerate(rows, start=1):
        fields = {key: _named(value, named[key]) for key, value in row.items()}
        yield Record(f"{location}: row {number}", number, fields)


def _class_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "names", None)


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
