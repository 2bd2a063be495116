"""Counter-based random numbers: a draw is a pure function of a key and a counter, so there is no state to lose.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
read at any place: draw number `i` of stream `key` is `mix64(key + (i + 1) * GAMMA)`. It is spelled out here instead
of taken from numpy, whose generators may change their streams between releases: a run must see the same rows after an
upgrade.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Uint64Array = NDArray[np.uint64]

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def stream_key(*parts: int | str) -> np.uint64:
    """A stream named by what it is for, e.g. `stream_key(seed, "shards", epoch)`; other names, unrelated streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def mix64(values: Uint64Array) -> Uint64Array:
    """SplitMix64's finalizer, elementwise modulo 2**64. Overwrites and returns `values`."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def draws(key: np.uint64 | Uint64Array, counters: Uint64Array) -> Uint64Array:
    """64 random bits for each counter. A `key` that is an array broadcasts against `counters`: one stream per key."""
    return mix64((counters + np.uint64(1)) * GAMMA + key)


def permutation(key: np.uint64, length: int) -> NDArray[np.int64]:
    """A random order of 0 … length-1.

    Each number is sorted by its draw. The number itself replaces the draw's lowest bits, so that all sort keys differ
    and the result does not depend on the sorting algorithm.
    """
    numbers = np.arange(length, dtype=np.uint64)
    low_bits = np.uint64((1 << max(length - 1, 0).bit_length()) - 1)
    sort_keys = (draws(key, numbers) & ~low_bits) | numbers
    sort_keys.sort()
    return (sort_keys & low_bits).astype(np.int64)
