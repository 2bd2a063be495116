import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.counter_rng import draws, permutation, stream_key


def test_is_splitmix64() -> None:
    # The first outputs of Vigna's splitmix64.c with state 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert draws(np.uint64(1234567), np.arange(4, dtype=np.uint64)).tolist() == expected


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 1023, 1024, 1025])
def test_permutation_holds_every_number_once(length: int) -> None:
    assert sorted(permutation(stream_key("x"), length).tolist()) == list(range(length))


@given(st.integers(0, 2**63), st.integers(0, 10**6))
def test_other_names_give_other_streams(seed: int, epoch: int) -> None:
    names = [(seed, "a", epoch), (seed, "b", epoch), (seed + 1, "a", epoch), (seed, "a", epoch + 1)]
    assert len({int(stream_key(*name)) for name in names}) == 4


def test_permutations_are_uniform() -> None:
    """Chi-square of where each of 8 numbers lands in 20,000 permutations: 49 degrees of freedom, p = 1e-6 at 117."""
    counts = np.zeros((8, 8))
    for trial in range(20_000):
        counts[np.arange(8), permutation(stream_key("uniform", trial), 8)] += 1
    assert ((counts - 2500) ** 2 / 2500).sum() < 117
