"""Dynamic batching: what waits while the model computes is the next batch.

    requests ─► bounded queue ─► the longest-waiting and those most like it in length ─► model, in a few threads
                 │ full: QueueFull                                                          │
                 └────────────────────────── each request's own answer ◄───────────────────┘

There is no delay to tune: an idle thread takes a lone request at once, and a busy one finds its next batch waiting.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Input = TypeVar("Input")
Answer = TypeVar("Answer")


class QueueFull(Exception):
    """As many inputs wait as may wait; the caller should come back later."""


@dataclass(eq=False)
class _Waiting(Generic[Input, Answer]):
    input: Input
    size: int
    answer: "asyncio.Future[Answer]"


class Batcher(Generic[Input, Answer]):
    """Answers single inputs with a function of batches. Everything but the function runs on one event loop.

    Args:
        predict: from a batch of inputs to as many answers; called in threads of its own.
        size: cost of an input, its number of characters, say; inputs of like size share a batch, so little is padding.
        batch_rows: inputs in a batch at most.
        queue_rows: inputs that may wait, those being computed not counted.
        threads: batches computed at the same time.
        observe: told the rows of each batch, for metrics.
    """

    def __init__(
        self,
        predict: Callable[[list[Input]], Sequence[Answer]],
        *,
        size: Callable[[Input], int],
        batch_rows: int,
        queue_rows: int,
        threads: int = 1,
        observe: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self.batch_rows, self.queue_rows = batch_rows, queue_rows
        self._predict, self._size, self._observe = predict, size, observe
        self._queue: deque[_Waiting[Input, Answer]] = deque()
        self._arrived = asyncio.Event()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "model")

    @property
    def waiting(self) -> int:
        """Inputs in the queue."""
        return len(self._queue)

    async def answer(self, inputs: Sequence[Input]) -> list[Answer]:
        """The answers to a request's inputs, in order. Cancelling it takes those that still wait out of the queue.

        Raises:
            QueueFull: there is no room for all of them; none was queued then.
            Exception: what `predict` raised for a batch with one of them.
        """
        if len(self._queue) + len(inputs) > self.queue_rows:
            raise QueueFull
        loop = asyncio.get_running_loop()
        mine = [_Waiting[Input, Answer](each, self._size(each), loop.create_future()) for each in inputs]
        self._queue.extend(mine)
        self._arrived.set()
        try:
            return await asyncio.gather(*(each.answer for each in mine))
        except asyncio.CancelledError:
            self._queue = deque(each for each in self._queue if each not in mine)
            raise

    async def run(self) -> None:
        """Compute batches until cancelled."""
        await asyncio.gather(*(self._run_one_at_a_time() for _ in range(self._threads)))

    async def _run_one_at_a_time(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            self._observe(len(batch))
            try:
                answers = await loop.run_in_executor(self._pool, self._predict, [each.input for each in batch])
                answered = list(zip(batch, answers, strict=True))
            except Exception as error:
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            for each, answer in answered:
                if not each.answer.done():
                    each.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting[Input, Answer]]:
        """The first in the queue, which bounds how long any waits, and those nearest to it in size."""
        nearest = list(self._queue)
        if len(nearest) > self.batch_rows:
            first = nearest[0]
            nearest.sort(key=lambda each: abs(each.size - first.size))  # stable: among equals the longest-waiting
        taken, left = nearest[: self.batch_rows], set(nearest[self.batch_rows :])
        self._queue = deque(each for each in self._queue if each in left)
        return taken
