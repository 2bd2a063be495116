import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.ledger import (
    LedgerComparison,
    LedgerEntry,
    LedgerWriter,
    compare_ledgers,
    read_ledger,
)
from dstrain.data.rows import digest_hex
from dstrain.errors import CorpusError


def entry(step: int, digest: str = "d") -> LedgerEntry:
    return LedgerEntry(step, (step * 16, step * 16 + 15), f"{digest}{step:031x}")


def write(path: Path, steps: list[int], digest: str = "d") -> Path:
    with LedgerWriter(path) as ledger:
        for step in steps:
            ledger.append(entry(step, digest))
    return path


def test_a_line_is_what_is_documented(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [2])
    assert json.loads(path.read_text()) == {"step": 2, "rows": [32, 47], "digest": "d" + "0" * 30 + "2"}


def test_digest_hex_is_32_digits() -> None:
    assert digest_hex(np.array([1, -1], np.int64)) == "0000000000000001ffffffffffffffff"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(1, 12)), min_size=1, max_size=6))
def test_a_resumed_run_overrules_what_came_before(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, int]]
) -> None:
    """Each attempt goes back by some steps and writes on; the valid history is what a plain list would hold."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    expected: list[LedgerEntry] = []
    for number, (back, steps) in enumerate(attempts):
        start = max(len(expected) - back, 0)
        del expected[start:]
        expected += [entry(step, f"{number:x}") for step in range(start, start + steps)]
        write(path, list(range(start, start + steps)), f"{number:x}")
    assert list(read_ledger(path)) == expected[::-1]


def test_an_unfinished_line_is_passed_over_and_then_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [0, 1, 2])
    with path.open("ab") as file:
        file.write(b'{"step": 3, "rows": [48')
    assert [line.step for line in read_ledger(path)] == [2, 1, 0]
    write(path, [3, 4])
    assert [line.step for line in read_ledger(path)] == [4, 3, 2, 1, 0]


def test_a_damaged_line_inside_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [0, 1, 2])
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step" 1'))
    with pytest.raises(CorpusError, match=r"ledger\.jsonl: damaged line"):
        list(read_ledger(path))


def test_comparison_names_the_first_difference(tmp_path: Path) -> None:
    ours = write(tmp_path / "a.jsonl", list(range(20)))
    same = write(tmp_path / "b.jsonl", list(range(5, 30)))
    assert compare_ledgers(ours, same) == LedgerComparison(15, None)
    other = write(write(tmp_path / "c.jsonl", list(range(20))), [9, 10], "e")
    assert compare_ledgers(ours, other) == LedgerComparison(11, 9)
