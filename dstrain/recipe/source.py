"""Strict YAML: a tree in which every value knows where it was written.

PyYAML does the parsing; what a scalar means is decided here, because YAML 1.1 reads `3e-4` as text, `no` as false,
`1:30` as ninety, and lets the last of two equal keys win silently. The rules are those of YAML 1.2's core schema,
narrowed: `true` and `false` are the only booleans, `3e-4` is a number, what is not a decimal number either is text.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, ScalarNode, SequenceNode
from yaml.nodes import Node as YamlNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from dstrain.errors import RecipeError

Scalar: TypeAlias = str | int | float | bool | None
Plain: TypeAlias = "Scalar | dict[str, Plain] | list[Plain]"

_INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9])*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9](_?[0-9])*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LITERALS: dict[str, Scalar] = {"": None, "~": None, "null": None, "true": True, "false": False}
_MAX_NODES = 10_000  # a recipe has a few hundred; aliases of aliases can make billions of them


@dataclass(frozen=True)
class Place:
    """Where something was written: a file and a line (from 1), or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass(frozen=True)
class Problem:
    """One mistake: the place and a sentence which says what was given, which rule it broke and what to do."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Node:
    """A value with its place; scalars of a file also with the text that was written, and whether it stood in quotes."""

    value: "Scalar | dict[str, Node] | list[Node]"
    place: Place
    written: str | None = None
    quoted: bool = False

    def plain(self) -> Plain:
        """Return the value without places, as JSON would hold it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def parse_scalar(text: str) -> Scalar:
    """Return what an unquoted scalar means: null, a boolean, an int, a finite float, or else the text itself."""
    if text in _LITERALS:
        return _LITERALS[text]
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if _NUMBER.fullmatch(text):
        number = float(text.replace("_", ""))
        return number if math.isfinite(number) else text
    return text


def read_yaml(path: str) -> tuple[Node, list[Problem]]:
    """Read a file whose top level is a mapping.

    Returns the tree and the mistakes which do not stop it from being read (duplicate keys, tags). Raises RecipeError
    where there is no tree: no such file, not UTF-8, a syntax error, several documents.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    tree, problems = parse_yaml(text, Place(path, 1))
    if not isinstance(tree.value, dict):
        found = "is empty" if tree.value is None else "is not a mapping"
        raise RecipeError(f"{path}:1: the recipe {found}; write `key: value` lines, beginning with `name:`")
    return tree, problems


def parse_yaml(text: str, start: Place) -> tuple[Node, list[Problem]]:
    """Parse one YAML document into a tree; places are counted from `start`. Raises RecipeError on a syntax error."""
    problems: list[Problem] = []
    try:
        root = _TagRefusingComposer(text, start, problems).get_single_node()
        if root is None:
            return Node(None, start), problems
        return _Converter(start, problems).convert(root, _shift(start, root.start_mark.line)), problems
    except ReaderError as error:
        line = text.count("\n", 0, error.position)
        place = _shift(start, line)
        raise RecipeError(f"{place}: not valid YAML: the character {chr(error.character)!r} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _shift(start, mark.line if mark else 0)
        context = f" {error.context}" if error.context else ""
        raise RecipeError(f"{place}: not valid YAML:{context} {error.problem}".rstrip()) from None
    except RecursionError:
        raise RecipeError(f"{start}: the values are nested too deeply for any recipe; write them out flat") from None


def _shift(start: Place, line: int) -> Place:
    return start if start.line is None else Place(start.file, start.line + line)


class _TagRefusingComposer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's composer without implicit types (they are ours to decide), which notes every tag as a mistake."""

    def __init__(self, text: str, start: Place, problems: list[Problem]) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._start = start
        self._problems = problems

    def compose_node(self, parent: YamlNode | None, index: object) -> YamlNode | None:
        """Compose one node as PyYAML does, after looking at its tag."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            place = _shift(self._start, event.start_mark.line)
            self._problems.append(Problem(place, f"the tag {tag} is not allowed; write the plain value"))
        node: YamlNode | None = super().compose_node(parent, index)  # type: ignore[arg-type]
        return node


class _Converter:
    """Turns PyYAML's nodes into ours, collecting mistakes."""

    def __init__(self, start: Place, problems: list[Problem]) -> None:
        self._start = start
        self._problems = problems
        self._open: set[int] = set()
        self._made = 0

    def convert(self, node: YamlNode, place: Place) -> Node:
        self._made += 1
        if id(node) in self._open or self._made > _MAX_NODES:
            raise RecipeError(f"{place}: an alias leads back into itself or expands without end; write the values out")
        if isinstance(node, ScalarNode):
            quoted = node.style is not None
            return Node(node.value if quoted else parse_scalar(node.value), place, node.value, quoted)
        self._open.add(id(node))
        value = dict(self._entries(node)) if isinstance(node, MappingNode) else self._items(node)
        self._open.remove(id(node))
        return Node(value, place)

    def _items(self, node: YamlNode) -> list[Node]:
        assert isinstance(node, SequenceNode)
        return [self.convert(item, _shift(self._start, item.start_mark.line)) for item in node.value]

    def _entries(self, node: MappingNode) -> Iterator[tuple[str, Node]]:
        first_places: dict[str, Place] = {}
        for key_node, value_node in node.value:
            place = _shift(self._start, key_node.start_mark.line)
            if not isinstance(key_node, ScalarNode) or not key_node.value:
                self._problems.append(Problem(place, "a key must be a word, as in `steps: 1000`"))
                continue
            key = key_node.value
            if key == "<<":
                self._problems.append(Problem(place, "merge keys `<<` are not supported; inherit with `base:` instead"))
            elif key in first_places:
                first = first_places[key]
                line = f"line {first.line}" if first.line is not None else "before"
                self._problems.append(
                    Problem(place, f"the key {key!r} is already set on {line}; delete one of the two")
                )
            else:
                first_places[key] = place
                yield key, self.convert(value_node, place)
