"""What `dstrain predict` reads: one item a line, or why that line holds none."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from dstrain.errors import CorpusError, UserError
from dstrain.examples.formats import jsonl_record
from dstrain.examples.record import Record
from dstrain.examples.records import Reading, format_of, half_character, records_in
from dstrain.recipe.messages import nearest


@dataclass(frozen=True)
class Item:
    """The fields that a model takes, in its order, or why there are none. `id`: what the line itself calls it.

    `given`: all that the line holds, where it holds fields.
    """

    place: str
    values: tuple[Any, ...] = ()
    problem: str | None = None
    id: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)


def read_items(stream: BinaryIO, name: str, fields: Sequence[str], tokens_field: str | None = None) -> Iterator[Item]:
    """The items of a stream: records of a file whose name says its format, as training reads them; JSON objects where
    the first line is one; otherwise one text a line. Lines are read as they come, other formats as a whole.

    Args:
        stream: of bytes in UTF-8.
        name: stands in messages for where the text comes from, and tells the format.
        fields: columns or keys of what the model takes; plain lines will do where it is one.
        tokens_field: key of a list of tokens, which may stand in for the only field.

    Raises:
        UserError: a file that is none of its format, or lacks a column; or plain lines where they are not enough.
    """
    if _format(name) not in (None, "jsonl", "text"):
        # Of the others each record tells; and of a text, where tokens may stand in for it.
        needed = {fields[0]: "--text-field"} if tokens_field is None else {}
        records = records_in(stream.read(), Path(name), Reading(), needed)
        return (_record_item(record, fields, tokens_field) for record in records)
    if name.endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    lines = enumerate(stream, start=1)
    first = next(lines, None)
    if first is None:
        return iter(())
    numbered = chain([first], lines)
    if _format(name) == "jsonl" or first[1].lstrip().startswith(b"{"):
        return (_record_item(jsonl_record(line, name, number), fields, tokens_field) for number, line in numbered)
    if len(fields) > 1:
        raise UserError(f"{name}:1: this model takes {' and '.join(fields)}; write one JSON object a line with both")
    return (_line_item(f"{name}:{number}", line) for number, line in numbered)


def _format(name: str) -> str | None:
    """The format that a name tells; None for standard input, and for a name that tells none."""
    try:
        return format_of(Path(name), None)
    except CorpusError:
        return None


def _line_item(place: str, line: bytes) -> Item:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Item(place, problem=f"not UTF-8 (byte 0x{line[error.start]:02x})")
    return Item(place, (text,)) if text else Item(place, problem="empty, no text to work on")


def _record_item(record: Record, fields: Sequence[str], tokens_field: str | None) -> Item:
    place, value = record.place, record.fields
    if record.problem:
        return Item(place, problem=record.problem)
    half = half_character(value)
    if half:
        return Item(place, problem=half)
    tokens = value.get(tokens_field) if tokens_field else None
    if isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens):
        return Item(place, (tuple(tokens),), id=value.get("id"))
    for name in fields:
        if name not in value:
            close = nearest(name, value)
            remedy = "--text-field" if name == fields[0] else "add it"
            return Item(place, problem=f"has no field {name!r}; {f'it has {close!r}: ' if close else ''}{remedy}")
        text = value[name]
        if not isinstance(text, str) or not text.strip():
            return Item(place, problem=f"{name} is {json.dumps(text, default=str)[:40]}, no text to work on")
    return Item(place, tuple(value[name] for name in fields), id=value.get("id"), given=value)
