import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.order import Order
from dstrain.errors import CorpusError


def epoch_of(order: Order, counts: list[int], lanes: int, window: int, epoch: int) -> list[list[tuple[int, int]]]:
    """(shard, document) of every lane in reading order."""
    lanes_read = []
    for lane in range(lanes):
        read = []
        for number in range(-(-order.lane_documents(lane) // window)):
            line = [
                (shard, doc) for shard, first, last in order.runs(epoch, lane, number) for doc in range(first, last)
            ]
            read += [line[index] for index in order.shuffle(epoch, lane, number)]
        assert len(read) == order.lane_documents(lane)
        lanes_read.append(read)
    return lanes_read


@settings(deadline=None, max_examples=80)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    lanes=st.integers(1, 12),
    window=st.integers(1, 40),
    epoch=st.integers(0, 3),
)
def test_every_document_is_in_one_lane_once(counts: list[int], lanes: int, window: int, epoch: int) -> None:
    if sum(counts) < lanes:
        with pytest.raises(CorpusError, match=f"data.lanes={lanes}, but the train corpus has {sum(counts)} documents"):
            Order(np.array(counts), lanes, 0, window, "train")
        return
    order = Order(np.array(counts), lanes, 0, window, "train")
    read = [place for lane in epoch_of(order, counts, lanes, window, epoch) for place in lane]
    assert sorted(read) == [(shard, doc) for shard, count in enumerate(counts) for doc in range(count)]
    sizes = [order.lane_documents(lane) for lane in range(lanes)]
    assert max(sizes) - min(sizes) <= 1


def test_orders_differ_between_epochs_seeds_and_purposes() -> None:
    counts = [50] * 8
    orders = [
        epoch_of(Order(np.array(counts), 4, seed, 16, purpose), counts, 4, 16, epoch)
        for seed, purpose, epoch in [(0, "train", 0), (0, "train", 1), (1, "train", 0), (0, "valid", 0)]
    ]
    assert all(one != other for index, one in enumerate(orders) for other in orders[:index])


def test_the_remedy_for_too_many_lanes_divides_them() -> None:
    with pytest.raises(CorpusError, match=r"use data.lanes=16, or more documents"):
        Order(np.array([20]), 64, 0, 16, "train")


def test_a_window_anywhere_in_ten_million_documents_opens_in_milliseconds() -> None:
    order = Order(np.full(100_000, 100), 64, 0, 1024, "train")
    next(order.runs(0, 0, 0))  # lays out the epoch once
    seconds = []
    for window in (0, 100, 151):
        started = time.perf_counter()
        assert sum(last - first for _, first, last in order.runs(0, 63, window)) == len(order.shuffle(0, 63, window))
        seconds.append(time.perf_counter() - started)
    assert max(seconds) < 0.05
