"""The ledger of a run: a line per global step with the digest of its rows, to prove that two runs read the same.

    {"step": 17, "rows": [8704, 9215], "digest": "32 hexadecimal digits"}

Rows that the recipe has skipped stand there too, with the step that they would have been and `"skipped": true`.

The file is only ever appended to. A run that resumes at step s writes s, s+1, … again: what stood there from s on is
history, kept but no longer valid. Read backwards that rule is simple and takes no memory: a line counts when its step
is below all steps seen so far, and was not skipped.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dstrain.errors import CorpusError

LEDGER_NAME = "ledger.jsonl"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class LedgerEntry:
    """One global step: its rows (first and last number, inclusive) and their digest. `skipped`: nothing was trained."""

    step: int
    rows: tuple[int, int]
    digest: str
    skipped: bool = False


@dataclass(frozen=True)
class LedgerComparison:
    """The steps that two ledgers share, and the first of them whose rows differ."""

    common_steps: int
    first_difference: int | None


class LedgerWriter:
    """Appends to a ledger. A line that a killed run left unfinished is cut off first."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        self._file.truncate(end_of_last_line(path))

    def append(self, entry: LedgerEntry) -> None:
        """Write one step, at once: after a SIGKILL all steps but the last are there."""
        content: dict[str, Any] = {"step": entry.step, "rows": list(entry.rows), "digest": entry.digest}
        if entry.skipped:
            content["skipped"] = True
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_ledger(path: Path) -> Iterator[LedgerEntry]:
    """The valid steps of a ledger, the last one first, in constant memory. Raises CorpusError for a damaged line."""
    return (entry for entry, counts in read_all_backwards(path) if counts)


def read_all_backwards(path: Path) -> Iterator[tuple[LedgerEntry, bool]]:
    """All steps of a ledger from the end, each with whether it is valid. Raises CorpusError for a damaged line."""
    lowest: int | None = None
    for number, line in enumerate(_lines_backwards(path)):
        entry = _parse(line)
        if entry is None:
            if number == 0:
                continue  # what a killed run left unfinished
            raise CorpusError(f"{path}: damaged line {line[:80]!r}; restore the file from a copy")
        counts = not entry.skipped and (lowest is None or entry.step < lowest)
        if counts:
            lowest = entry.step
        yield entry, counts


def compare_ledgers(path: Path, other: Path) -> LedgerComparison:
    """Compare the steps that both ledgers have, in constant memory. Raises CorpusError."""
    common, difference = 0, None
    ours, theirs = read_ledger(path), read_ledger(other)
    mine, its = next(ours, None), next(theirs, None)
    while mine is not None and its is not None:
        if mine.step > its.step:
            mine = next(ours, None)
        elif mine.step < its.step:
            its = next(theirs, None)
        else:
            common += 1
            if (mine.rows, mine.digest) != (its.rows, its.digest):
                difference = mine.step  # the steps come in falling order, so the last found is the first
            mine, its = next(ours, None), next(theirs, None)
    return LedgerComparison(common, difference)


def _parse(line: bytes) -> LedgerEntry | None:
    try:
        content = json.loads(line)
        first, last = content["rows"]
        return LedgerEntry(
            int(content["step"]), (int(first), int(last)), str(content["digest"]), content.get("skipped", False) is True
        )
    except (ValueError, KeyError, TypeError):
        return None


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file from its end, without their line ends."""
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        rest = b""
        while place > 0:
            size = min(READ_BYTES, place)
            place -= size
            file.seek(place)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line)
        if rest:
            yield rest


def end_of_last_line(path: Path) -> int:
    """The size of a file up to its last line end."""
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        while place > 0:
            start = max(place - READ_BYTES, 0)
            file.seek(start)
            found = file.read(place - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            place = start
    return 0
