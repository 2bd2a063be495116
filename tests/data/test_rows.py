import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dstrain.data.rows import Records, StepBuffer, StepShape

SHAPE = StepShape(rows=3, row_tokens=9, masked=2)


def records(seed: int = 0) -> Records:
    items = np.random.default_rng(seed).integers(0, 1000, (SHAPE.rows, SHAPE.record_items), dtype=np.int32)
    return Records(SHAPE, items)


def test_names_cover_the_record_once() -> None:
    made = records()
    ids = (made.input_ids, made.masked_positions, made.labels, made.position_ids)
    views: list[NDArray[np.integer]] = [made.row_numbers, *ids]
    for number, view in enumerate(views):
        view[...] = number + 1
    assert made.items.tolist() == [[1, 0, *[2] * 9, 3, 3, 4, 4, *[5] * 9]] * 3


def test_pairs_come_last_in_a_record() -> None:
    shape = StepShape(rows=2, row_tokens=3, masked=1, pairs=2)
    made = Records(shape, np.zeros((2, shape.record_items), np.int32))
    made.pairs[...] = np.arange(16).reshape(2, 2, 4)
    assert made.items[:, -8:].tolist() == [list(range(8)), list(range(8, 16))]
    assert not made.items[:, :-8].any()


def test_a_buffer_holds_what_is_put_in() -> None:
    memory = bytearray(SHAPE.bytes)
    buffer = StepBuffer(SHAPE, memory)
    buffer.records.items[...] = records().items
    buffer.sources[...] = 2, 0, 1
    buffer.digest[...] = 3, 4
    buffer.step[...] = 7
    rows = StepBuffer(SHAPE, memory).rows()
    assert (rows.step, rows.sources.tolist(), rows.digest.tolist()) == (7, [2, 0, 1], [3, 4])
    assert (rows.input_ids == records().input_ids).all() and (rows.labels == records().labels).all()


def test_the_digest_of_a_step_is_the_sum_over_any_parts() -> None:
    whole = records()
    parts = sum(Records(SHAPE, whole.items[row : row + 1].copy()).digest() for row in (2, 0, 1))
    assert (whole.digest() == parts).all()


def test_the_digest_stays_as_it_is() -> None:
    """Ledgers of earlier releases must stay comparable."""
    items = np.arange(SHAPE.rows * SHAPE.record_items, dtype=np.int32).reshape(SHAPE.rows, -1)
    assert Records(SHAPE, items).digest().tolist() == [-7138072810020692882, 8625116392058298013]


@given(
    row=st.integers(0, SHAPE.rows - 1),
    item=st.integers(0, SHAPE.record_items - 1),
    change=st.integers(-(2**31), 2**31 - 1).filter(bool),
)
def test_any_change_of_an_item_shows_in_both_halves(row: int, item: int, change: int) -> None:
    before, after = records(), records()
    after.items[row, item] = np.int64(int(after.items[row, item]) + change).astype(np.int32)
    assert (before.digest() != after.digest()).all()


@given(st.permutations(range(SHAPE.record_items)))
def test_the_order_of_items_shows(order: list[int]) -> None:
    before = records()
    after = Records(SHAPE, np.ascontiguousarray(before.items[:, order]))
    assert (before.items == after.items).all() or (before.digest() != after.digest()).all()


def test_digests_are_spread_over_all_bits() -> None:
    """Rows that differ in one small number: each bit of the digest is set in about half of them (6 sigma)."""
    made = Records(StepShape(4096, 9, 2), np.zeros((4096, SHAPE.record_items), np.int32))
    made.input_ids[:, 0] = np.arange(4096)
    digests = np.array([Records(SHAPE, row[None]).digest() for row in made.items]).view(np.uint64)
    for bit in range(64):
        share = ((digests >> np.uint64(bit)) & np.uint64(1)).mean(axis=0)
        assert (abs(share - 0.5) < 6 * 0.5 / 64).all()
