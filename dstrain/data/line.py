"""The order in which one corpus is read: arithmetic on numbers of tokens, without a table and without a state.

    line      the corpus' documents laid end to end: T tokens in natural order
    block     `block_tokens` tokens of the line; the last block is shorter
    epoch     the blocks in an order drawn from (seed, corpus, epoch), laid end to end: the epoch's *permuted line*
    lane      one of `lanes` ranges of the permuted line. Their lengths differ by at most one token, and which lanes
              have one more takes turns, so that after any number of epochs no lane is two tokens ahead of another
    window    some blocks of the permuted line side by side. The slices of documents in the part of a window that
              belongs to a lane are read in a drawn order
    life      a lane's epochs laid end to end, without end: position p of a lane's life is a closed form of p

Every epoch reads each token of the corpus exactly once, whatever the lengths of documents. (Blocks and lanes that are
all equally long leave a remainder to the next epoch, in which the counts of two tokens then differ by two. Lanes that
may begin inside a block have no remainder.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import draws, permutation, stream_key
from dstrain.data.permutation import permute, unpermute

BLOCK_DOCUMENTS = 128  # in a block, on average: so few documents are cut by its borders
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 12, 1 << 20  # tokens
FEWEST_BLOCKS = 4  # of a corpus, where it has tokens for it: or no two epochs would differ
WINDOW_BLOCKS = 8192  # shuffled together over all lanes, by default
FEWEST_WINDOW_BLOCKS = 32  # of a lane, by default
MOST_KEPT = 1 << 16  # blocks whose order is kept
EPOCHS_KEPT = 3  # lanes cross the end of an epoch at different times


def default_block_tokens(tokens: int, documents: int) -> int:
    """The size of a block: its borders cut fewer than 1 % of the documents, where the corpus allows that."""
    mean = tokens / max(documents, 1)
    wanted = min(max(round(BLOCK_DOCUMENTS * mean), SMALLEST_BLOCK), LARGEST_BLOCK)
    return max(1, min(wanted, -(-tokens // FEWEST_BLOCKS)))


def default_window_blocks(lanes: int) -> int:
    """How many blocks of a lane are shuffled together: the same number over all lanes, however many those are."""
    return max(FEWEST_WINDOW_BLOCKS, -(-WINDOW_BLOCKS // lanes))


@dataclass(frozen=True)
class Window:
    """A lane's part of a window: tokens `first` … `last` - 1 of the permuted line of an epoch.

    `life` is the position of its first token in the lane's life. `ranges` (N, 2) are the tokens of the corpus' line
    that it holds, first and last + 1, before the documents in it are shuffled.
    """

    lane: int
    epoch: int
    number: int
    first: int
    last: int
    life: int
    ranges: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return self.last - self.first


class Line:
    """The order of one corpus.

    Args:
        tokens: of the corpus, at least one.
        lanes: number of lanes.
        key: what the order is drawn from: the seed, what the rows are for, and the corpus' digest.
        block_tokens: of a block.
        window_blocks: blocks that are shuffled together.
    """

    def __init__(
        self, tokens: int, lanes: int, key: tuple[int | str, ...], block_tokens: int, window_blocks: int
    ) -> None:
        assert tokens > 0 and lanes > 0 and block_tokens > 0 and window_blocks > 0
        self.tokens, self.lanes = tokens, lanes
        self.block_tokens, self.window_blocks = block_tokens, window_blocks
        self._key = key
        self.full_blocks, self._rest = divmod(tokens, block_tokens)
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def blocks(self) -> int:
        """Blocks of an epoch, the shorter one included."""
        return self.full_blocks + (self._rest > 0)

    # ------------------------------------------------------------ a lane's life

    def epoch_of(self, lane: int, position: int) -> int:
        """The epoch that a position of a lane's life is in."""
        return ((position + 1) * self.lanes - lane - 1) // self.tokens

    def epoch_start(self, lane: int, epoch: int) -> int:
        """The position of a lane's life at which an epoch begins."""
        return (epoch * self.tokens + lane) // self.lanes

    def lane_range(self, lane: int, epoch: int) -> tuple[int, int]:
        """The tokens of an epoch's permuted line that a lane reads: first and last + 1."""
        return self._lane_first(lane, epoch), self._lane_first(lane + 1, epoch)

    def lane_of(self, token: int, epoch: int) -> int:
        """The lane that reads a token of an epoch's permuted line: the inverse of `lane_range`."""
        low, high = 0, self.lanes
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._lane_first(middle, epoch) <= token else (low, middle)
        return low

    def _lane_first(self, lane: int, epoch: int) -> int:
        """How many tokens of an epoch the lanes before this one have."""
        return self._started(lane, (epoch + 1) * self.tokens) - self._started(lane, epoch * self.tokens)

    def _started(self, lane: int, tokens: int) -> int:
        """The sum of floor((tokens + l) / lanes) over the lanes l before this one."""
        quotient, rest = divmod(tokens, self.lanes)
        return lane * quotient + max(0, lane + rest - self.lanes)

    # ------------------------------------------------------------ the permuted line

    def _rest_slot(self, epoch: int) -> int:
        """Where the shorter block stands among the blocks of an epoch; behind all of them where there is none."""
        if not self._rest:
            return self.full_blocks
        drawn = draws(stream_key(*self._key, "rest", epoch), np.zeros(1, np.uint64))[0]
        return int(drawn % np.uint64(self.full_blocks + 1))

    def _slot_first(self, slot: int, rest_slot: int) -> int:
        """Where the block at a place begins on the permuted line."""
        return slot * self.block_tokens if slot <= rest_slot else (slot - 1) * self.block_tokens + self._rest

    def _slot_of(self, token: int, rest_slot: int) -> int:
        """The place of the block that a token of the permuted line is in."""
        if token < rest_slot * self.block_tokens:
            return token // self.block_tokens
        if token < rest_slot * self.block_tokens + self._rest:
            return rest_slot
        return (token - self._rest) // self.block_tokens + (self._rest > 0)

    def _blocks_at(self, first: int, last: int, epoch: int, rest_slot: int) -> NDArray[np.int64]:
        """The blocks that stand at places `first` … `last` - 1 of an epoch."""
        slots = np.arange(first, last)
        is_rest = (slots == rest_slot) & (self._rest > 0)
        of_full = np.where(is_rest, 0, slots - ((slots > rest_slot) & (self._rest > 0)))
        if not self.full_blocks:
            return np.zeros(len(slots), np.int64)
        if self.full_blocks <= MOST_KEPT:
            blocks = self._block_order(epoch)[of_full]
        else:
            blocks = permute(of_full, self.full_blocks, self._block_key(epoch))
        return np.where(is_rest, self.full_blocks, blocks)

    def _block_order(self, epoch: int) -> NDArray[np.int64]:
        """All full blocks in the order of an epoch: of few blocks, looking one up is cheaper than computing it."""
        order = self._orders.get(epoch)
        if order is None:
            if len(self._orders) == EPOCHS_KEPT:
                self._orders.pop(min(self._orders))
            order = permute(np.arange(self.full_blocks), self.full_blocks, self._block_key(epoch))
            self._orders[epoch] = order
        return order

    def _block_key(self, epoch: int) -> np.uint64:
        return stream_key(*self._key, "blocks", epoch)

    # ------------------------------------------------------------ windows

    def window_at(self, lane: int, position: int) -> Window:
        """The window that a position of a lane's life is in."""
        epoch = self.epoch_of(lane, position)
        lane_first, _ = self.lane_range(lane, epoch)
        return self._window(lane, epoch, lane_first + position - self.epoch_start(lane, epoch))

    def _window(self, lane: int, epoch: int, token: int) -> Window:
        """A lane's window around a token of the permuted line."""
        rest_slot = self._rest_slot(epoch)
        lane_first, lane_last = self.lane_range(lane, epoch)
        number = self._slot_of(token, rest_slot) // self.window_blocks
        first_slot = number * self.window_blocks
        last_slot = min(first_slot + self.window_blocks, self.blocks)
        window_last = self.tokens if last_slot == self.blocks else self._slot_first(last_slot, rest_slot)
        first, last = max(lane_first, self._slot_first(first_slot, rest_slot)), min(lane_last, window_last)
        first_slot, last_slot = self._slot_of(first, rest_slot), self._slot_of(last - 1, rest_slot) + 1
        blocks = self._blocks_at(first_slot, last_slot, epoch, rest_slot)
        ranges = np.stack([blocks, blocks + 1], axis=1) * self.block_tokens
        ranges[:, 1] = np.minimum(ranges[:, 1], self.tokens)
        ranges[-1, 1] -= self._slot_first(last_slot - 1, rest_slot) + ranges[-1, 1] - ranges[-1, 0] - last
        ranges[0, 0] += first - self._slot_first(first_slot, rest_slot)
        life = self.epoch_start(lane, epoch) + first - lane_first
        return Window(lane, epoch, number, first, last, life, ranges)

    def shuffle(self, window: Window, slices: int) -> NDArray[np.int64]:
        """The order in which the slices of documents of a window are read: indices into them in natural order."""
        return permutation(stream_key(*self._key, "window", window.epoch, window.lane, window.number), slices)

    # ------------------------------------------------------------ the way back

    def windows_of(self, first: int, last: int, epoch: int) -> Iterator[tuple[Window, int, int]]:
        """The windows in which an epoch reads tokens `first` … `last` - 1 of the corpus' line.

        Yields:
            The window, and the tokens of the line that it reads of them: first and last + 1.
        """
        rest_slot = self._rest_slot(epoch)
        while first < last:
            block = first // self.block_tokens
            block_last = min((block + 1) * self.block_tokens, self.tokens, last)
            if block == self.full_blocks:
                slot = rest_slot
            else:
                place = int(unpermute(np.array([block]), self.full_blocks, self._block_key(epoch))[0])
                slot = place + (self._rest > 0 and place >= rest_slot)
            begin = self._slot_first(slot, rest_slot) - block * self.block_tokens  # permuted line less natural line
            while first < block_last:
                lane = self.lane_of(first + begin, epoch)
                window = self._window(lane, epoch, first + begin)
                stop = min(block_last, window.last - begin)
                yield window, first, stop
                first = stop
