"""Batching: every input gets its own answer whatever the timing, and nothing waits without bound."""

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.serve.batcher import Batcher, QueueFull


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=12),
    batch_rows=st.integers(1, 8),
    threads=st.integers(1, 3),
    pauses=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_each_request_gets_its_own_answers_in_order(
    requests: list[list[int]], batch_rows: int, threads: int, pauses: list[bool]
) -> None:
    batches: list[int] = []

    def predict(inputs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        batches.append(len(inputs))
        return list(inputs)

    async def play() -> list[list[tuple[int, int, int]]]:
        batcher: Batcher[tuple[int, int, int], tuple[int, int, int]] = Batcher(
            predict, size=lambda each: each[2], batch_rows=batch_rows, queue_rows=1000, threads=threads
        )
        running = asyncio.create_task(batcher.run())
        tasks = []
        for request, (sizes, pause) in enumerate(zip(requests, pauses, strict=False)):
            inputs = [(request, place, size) for place, size in enumerate(sizes)]
            tasks.append(asyncio.create_task(batcher.answer(inputs)))
            if pause:
                await asyncio.sleep(0)
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        running.cancel()
        assert batcher.waiting == 0
        return answers

    answers = asyncio.run(play())
    assert answers == [[(r, p, size) for p, size in enumerate(sizes)] for r, sizes in enumerate(requests)]
    assert max(batches) <= batch_rows
    assert sum(batches) == sum(map(len, requests))


def test_what_waits_shares_a_batch_with_inputs_of_its_size() -> None:
    batches: list[list[int]] = []
    gate = threading.Event()

    def predict(inputs: list[int]) -> list[int]:
        gate.wait(10)
        batches.append(inputs)
        return inputs

    async def play() -> None:
        batcher: Batcher[int, int] = Batcher(predict, size=lambda each: each, batch_rows=2, queue_rows=10)
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.answer([1]))
        await asyncio.sleep(0.05)  # it computes; the rest waits
        rest = [asyncio.create_task(batcher.answer([size])) for size in (50, 3, 49, 4)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(first, *rest)
        running.cancel()

    asyncio.run(play())
    assert batches == [[1], [50, 49], [3, 4]]  # 50 waited longest, and 49 is next to it


def test_as_many_batches_as_threads_are_computed_at_a_time() -> None:
    others = threading.Barrier(2)

    def predict(inputs: list[int]) -> list[int]:
        others.wait(10)  # breaks where nobody else comes
        return inputs

    async def play() -> None:
        batcher: Batcher[int, int] = Batcher(predict, size=lambda each: 1, batch_rows=1, queue_rows=9, threads=2)
        running = asyncio.create_task(batcher.run())
        assert await batcher.answer([1, 2, 3, 4]) == [1, 2, 3, 4]
        running.cancel()

    asyncio.run(play())


def test_a_full_queue_refuses_a_request_whole_and_a_cancelled_one_makes_room() -> None:
    gate = threading.Event()
    seen: list[int] = []

    def predict(inputs: list[int]) -> list[int]:
        gate.wait(10)
        seen.extend(inputs)
        return inputs

    async def play() -> None:
        batcher: Batcher[int, int] = Batcher(predict, size=lambda each: 1, batch_rows=1, queue_rows=1)
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.answer([0]))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(batcher.answer([1]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.answer([2])
        late.cancel()
        await asyncio.sleep(0.05)
        kept = asyncio.create_task(batcher.answer([4]))
        await asyncio.sleep(0)
        gate.set()
        assert await first == [0]
        assert await kept == [4]
        running.cancel()

    asyncio.run(play())
    assert seen == [0, 4]  # what nobody waits for is not computed


def test_a_failure_of_the_model_reaches_those_in_the_batch_and_the_next_batch_works() -> None:
    def predict(inputs: list[int]) -> list[int]:
        if 13 in inputs:
            raise RuntimeError("unlucky")
        return [each for each in inputs if each != 14]

    async def play() -> None:
        batcher: Batcher[int, int] = Batcher(predict, size=lambda each: 1, batch_rows=4, queue_rows=9)
        running = asyncio.create_task(batcher.run())
        with pytest.raises(RuntimeError, match="unlucky"):
            await batcher.answer([13])
        with pytest.raises(ValueError, match="shorter"):  # an answer is missing
            await asyncio.wait_for(batcher.answer([14, 15]), 10)
        assert await batcher.answer([1]) == [1]
        running.cancel()

    asyncio.run(play())
