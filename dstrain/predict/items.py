"""What `dstrain predict` reads: one item a line, or why that line holds none."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

from dstrain.errors import UserError
from dstrain.recipe.messages import nearest
from dstrain.tasks.records import half_character


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
    """The items of a stream: a .csv by its header, JSON objects where the first line is one, otherwise one text a line.

    Args:
        stream: of bytes in UTF-8.
        name: stands in messages for where the text comes from, and tells a .csv.
        fields: columns or keys of what the model takes; plain lines will do where it is one.
        tokens_field: key of a list of tokens, which may stand in for the only field.

    Raises:
        UserError: a .csv without a column, or plain lines where they are not enough.
    """
    if name.endswith(".csv"):
        return _csv_items(stream, name, fields)
    lines = enumerate(stream, start=1)
    first = next(lines, None)
    if first is None:
        return iter(())
    numbered = chain([first], lines)
    if name.endswith(".jsonl") or first[1].lstrip().startswith(b"{"):
        return (_json_item(f"{name}:{number}", line, fields, tokens_field) for number, line in numbered)
    if len(fields) > 1:
        raise UserError(f"{name}:1: this model takes {' and '.join(fields)}; write one JSON object a line with both")
    return (_line_item(f"{name}:{number}", line) for number, line in numbered)


def _line_item(place: str, line: bytes) -> Item:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Item(place, problem=f"not UTF-8 (byte 0x{line[error.start]:02x})")
    return Item(place, (text,)) if text else Item(place, problem="empty, no text to work on")


def _json_item(place: str, line: bytes, fields: Sequence[str], tokens_field: str | None) -> Item:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Item(place, problem=f"not UTF-8 (byte 0x{line[error.start]:02x})")
    except json.JSONDecodeError as error:
        return Item(place, problem=f"not JSON ({error.msg} at character {error.pos + 1})")
    if not isinstance(value, dict):
        return Item(place, problem=f"is {type(value).__name__}, not an object")
    half = half_character(value)
    if half:
        return Item(place, problem=half)
    tokens = value.get(tokens_field) if tokens_field else None
    if isinstance(tokens, list) and tokens and all(isinstance(one, str) for one in tokens):
        return Item(place, (tuple(tokens),), id=value.get("id"))
    for name in fields:
        if name not in value:
            close = nearest(name, value)
            remedy = "--text-field" if name == fields[0] else "add it"
            return Item(place, problem=f"has no field {name!r}; {f'it has {close!r}: ' if close else ''}{remedy}")
        text = value[name]
        if not isinstance(text, str) or not text.strip():
            return Item(place, problem=f"{name} is {json.dumps(text)[:40]}, no text to work on")
    return Item(place, tuple(value[name] for name in fields), id=value.get("id"), given=value)


def _csv_items(stream: BinaryIO, name: str, fields: Sequence[str]) -> Iterator[Item]:
    csv.field_size_limit(sys.maxsize)  # the default refuses long documents
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    try:
        for field in fields:
            if field not in (rows.fieldnames or ()):
                columns = ", ".join(rows.fieldnames or ()) or "none"
                raise UserError(f"{name}:1: has no column {field!r}, its columns are: {columns}; give --text-field")
        for row in rows:
            place = f"{name}:{rows.line_num}"
            empty = [field for field in fields if not (row[field] or "").strip()]
            if empty:
                yield Item(place, problem=f"{empty[0]} is empty")
            else:
                yield Item(place, tuple(row[field] for field in fields), id=row.get("id"), given=row)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason}); convert it to UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: not CSV: {error}") from error
