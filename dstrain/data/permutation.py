"""A random order of 0 … length-1 without a table: each place is computed by itself, and so is its inverse.

A Feistel network over the next power of four (Luby and Rackoff 1988), applied again until the number falls inside the
range ("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): at most four times on
average, whatever the length.
"""

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import Uint64Array, draws

ROUNDS = 6


def permute(indices: NDArray[np.int64], length: int, key: np.uint64) -> NDArray[np.int64]:
    """What stands at these places, each 0 ≤ index < length, of the order that `key` draws."""
    return _walk(indices, length, key, range(ROUNDS))


def unpermute(values: NDArray[np.int64], length: int, key: np.uint64) -> NDArray[np.int64]:
    """The places of these values: the inverse of `permute`."""
    return _walk(values, length, key, range(ROUNDS - 1, -1, -1))


def _walk(numbers: NDArray[np.int64], length: int, key: np.uint64, rounds: range) -> NDArray[np.int64]:
    half_bits = np.uint64(max(1, -(-max(length - 1, 1).bit_length() // 2)))
    walked = np.asarray(numbers, np.int64).astype(np.uint64).reshape(-1)
    outside = np.ones(len(walked), np.bool_)
    while outside.any():
        walked[outside] = _network(walked[outside], half_bits, key, rounds)
        outside = walked >= np.uint64(length)
    return walked.astype(np.int64).reshape(np.shape(numbers))


def _network(numbers: Uint64Array, half_bits: np.uint64, key: np.uint64, rounds: range) -> Uint64Array:
    """One pass. A round exchanges the halves and changes one of them by a draw that the other one keys."""
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & low
    forward = rounds.step > 0
    for number in rounds:
        counter = np.uint64(number) << np.uint64(32)
        if forward:
            left, right = right, left ^ (draws(key, right + counter) & low)
        else:
            left, right = right ^ (draws(key, left + counter) & low), left
    return (left << half_bits) | right
