"""The one reader of JSON: from a text, a file, or a file of one value a line.

Python's own takes NaN, lets the last of two equal keys win, makes strings of half characters that nothing can write
again, and fails on depth and digits with errors of other kinds. Here all of these are one error that names the place.

The values are built by the C scanner of the standard library, at about its speed. It cannot say where a rule was
broken, so a text that breaks one is gone through a second time.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from dstrain.errors import UserError

MOST_BYTES = 1 << 30  # of a file, or of a line
MOST_DEPTH = 200  # Python's stack ends at some hundreds, where exactly depends on who calls
MOST_DIGITS = 4300  # of an integer, as Python limits them: more take quadratic time

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|-?\d[\d.eE+-]*|-?Infinity|NaN', re.DOTALL)
_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.")


class JsonError(UserError):
    """A text that is not JSON, or not such that can be used. `problem` says why and at which character of the line."""

    def __init__(self, place: str, line: int, problem: str) -> None:
        super().__init__(f"{place}:{line}: {problem}")
        self.place, self.line, self.problem = place, line, problem


class _Readable(Protocol):
    """A path, of a disk or of a storage."""

    def read_bytes(self) -> bytes:
        """All that is there."""


def parse_json(content: str | bytes, place: str | Path, *, line: int = 1, strict: bool = True) -> Any:
    """The value that a text holds.

    Args:
        content: bytes are UTF-8, with or without a byte order mark.
        place: the file, for messages.
        line: of the file, where the content begins.
        strict: refuse NaN, Infinity, equal keys and half characters. Not so for what another process of this program
            wrote (a loss may be NaN), nor for texts of which one field is used and looked at by itself.

    Raises:
        JsonError: it holds no such value.
    """
    if len(content) > MOST_BYTES:
        raise JsonError(str(place), line, f"JSON of {len(content):,} bytes, more than {MOST_BYTES:,}")
    text = content if isinstance(content, str) else _decoded(content, place, line)
    try:
        value = (_STRICT if strict else _TOLERANT).decode(text)
    except json.JSONDecodeError as error:
        _refuse(text, error.pos, place, line, f"not JSON ({error.msg} ")
    except (_Broken, RecursionError, ValueError):  # a ValueError: too many digits
        _refuse_broken(text, place, line, strict=strict)
    if text.count("[") + text.count("{") > MOST_DEPTH and _is_deep(value):
        _refuse_broken(text, place, line, strict=strict)
    if strict and (_SURROGATE.search(text) or not _is_unicode(text)):
        _refuse_halves(text, place, line)
    return value


def parse_json_object(content: str | bytes, place: str | Path, *, line: int = 1, strict: bool = True) -> dict[str, Any]:
    """The same, where it has to be an object. Raises JsonError."""
    value = parse_json(content, place, line=line, strict=strict)
    if not isinstance(value, dict):
        raise JsonError(str(place), line, f"is {kind_of(value)}, not an object")
    return value


def read_json(path: _Readable, *, strict: bool = True) -> Any:
    """The value that a file holds; see `parse_json`. Raises JsonError, or OSError where the file cannot be read."""
    if isinstance(path, Path) and (size := path.stat().st_size) > MOST_BYTES:  # before it is in memory
        raise JsonError(str(path), 1, f"JSON of {size:,} bytes, more than {MOST_BYTES:,}")
    return parse_json(path.read_bytes(), str(path), strict=strict)


def read_json_object(path: _Readable, *, strict: bool = True) -> dict[str, Any]:
    """The object that a file holds. Raises JsonError, or OSError where the file cannot be read."""
    value = read_json(path, strict=strict)
    if not isinstance(value, dict):
        raise JsonError(str(path), 1, f"is {kind_of(value)}, not an object")
    return value


def lines_of(file: IO[bytes], place: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, from 1. Raises JsonError where one is far too long.

    Only a line feed ends a line: texts may hold all other ends of lines that Unicode has.
    """
    number = 0
    while line := file.readline(MOST_BYTES + 1):
        number += 1
        if len(line) > MOST_BYTES:
            raise JsonError(str(place), number, f"a line of more than {MOST_BYTES:,} bytes")
        if not line.isspace():
            yield number, line


def read_json_lines(path: Path, *, strict: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one a line; blank lines are passed over.

    Raises JsonError, or OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in lines_of(file, path):
            yield parse_json_object(line, path, line=number, strict=strict)


def kind_of(value: object) -> str:
    """What a value of JSON is called in a message: "a list", "a text", "null", …"""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else "a text" if isinstance(value, str) else "a number"


class _Broken(Exception):
    """A rule is broken somewhere in the text."""


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999
        raise _Broken
    return number


def _constant(_: str) -> NoReturn:
    raise _Broken


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Broken
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_constant)
_TOLERANT = json.JSONDecoder()


def _decoded(content: bytes, place: str | Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise JsonError(
            str(place), line, f"not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); convert it to UTF-8"
        ) from None


def _is_deep(value: Any) -> bool:
    """Whether containers are within each other deeper than is allowed; by levels, so that no stack is needed."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(text: str, position: int, place: str | Path, line: int, problem: str) -> NoReturn:
    character = position - text.rfind("\n", 0, position)
    line += text.count("\n", 0, position)
    raise JsonError(str(place), line, f"{problem}at character {character})") from None


def _refuse_halves(text: str, place: str | Path, line: int) -> None:
    """Raise where there is one: `\\ud83d\\ude00` is a whole character, and `\\\\ud83d` no character at all."""
    for match in _HALF.finditer(text):
        if match[1]:
            _refuse(text, match.start(1), place, line, f"half a character (a lone surrogate {match[1]} ")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _refuse(text, error.start, place, line, f"half a character (a lone surrogate U+{ord(text[error.start]):04X} ")


def _refuse_broken(text: str, place: str | Path, line: int, *, strict: bool) -> NoReturn:
    """Say where the first rule is broken, in a text that is JSON otherwise as far as that."""
    open_keys: list[set[str] | None] = []  # of each object that is open, its keys so far; of a list, None
    is_key = False
    for match in _TOKEN.finditer(text):
        token, position = match[0], match.start()
        if token in "{[":
            open_keys.append(set() if token == "{" else None)
            if len(open_keys) > MOST_DEPTH:
                _refuse(text, position, place, line, f"JSON that is nested more than {MOST_DEPTH} deep (")
        elif token in "}]":
            open_keys = open_keys[:-1]
        elif token[0] == '"':
            keys = open_keys[-1] if open_keys else None
            if strict and is_key and keys is not None:
                key = json.loads(token)
                if key in keys:
                    _refuse(text, position, place, line, f"JSON with the key {key!r} twice in one object (again ")
                keys.add(key)
        elif token not in ",:":
            _require_number(token, text, position, place, line, strict=strict)
        is_key = token == "{" or (token == "," and bool(open_keys) and open_keys[-1] is not None)
    raise JsonError(str(place), line, f"JSON that cannot be read (nested more than {MOST_DEPTH} deep, or too large)")


def _require_number(token: str, text: str, position: int, place: str | Path, line: int, *, strict: bool) -> None:
    if token.lstrip("-").isdigit():
        if len(token.lstrip("-")) > MOST_DIGITS:
            digits = len(token.lstrip("-"))
            _refuse(text, position, place, line, f"JSON with a number of {digits:,} digits (at most {MOST_DIGITS:,}; ")
    elif strict and not math.isfinite(float(token)):
        _refuse(text, position, place, line, f"JSON with {token[:20]}, which is no number of JSON (write null; ")
