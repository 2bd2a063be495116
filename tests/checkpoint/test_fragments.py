from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dstrain.checkpoint.fragments import _partition, fragment_key, overlap, parse_fragment_key, share

SIZES = st.integers(0, 10_000)
WORLDS = st.integers(1, 64)


@given(SIZES, WORLDS)
def test_shares_cover_everything_once_and_evenly(numel: int, world_size: int) -> None:
    shares = [share(numel, rank, world_size) for rank in range(world_size)]
    assert shares[0][0] == 0
    assert shares[-1][1] == numel
    assert all(first[1] == second[0] for first, second in pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@given(SIZES, WORLDS)
def test_stage_3_partitions_cover_everything_once_without_padding(numel: int, world_size: int) -> None:
    padded = -(-numel // world_size)  # what DeepSpeed gives every rank
    reached = 0
    for rank in range(world_size):
        offset, count = _partition(numel, padded, rank)
        assert offset == reached
        assert 0 <= count <= padded
        reached += count
    assert reached == numel


@given(st.lists(st.integers(0, 50), max_size=8), st.lists(st.integers(0, 50), max_size=8))
def test_overlaps_of_two_partitions_carry_each_element_once(saved: list[int], wanted: list[int]) -> None:
    end = min(sum(saved), sum(wanted))
    carried = []
    for start, stop in stretches(wanted):
        for saved_stretch in stretches(saved):
            first, last = overlap((start, stop), saved_stretch)
            carried += range(first, last)
    assert carried == list(range(end))


def stretches(sizes: list[int]) -> list[tuple[int, int]]:
    """Stretches of these sizes, laid end to end."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return list(zip([0, *ends], ends, strict=False))


@given(st.text(min_size=1), st.sampled_from(["weight", "exp_avg"]), st.integers(0, 2**40))
def test_keys_are_read_as_they_were_written(parameter: str, state: str, offset: int) -> None:
    assert parse_fragment_key(fragment_key(parameter, state, offset)) == (parameter, state, offset)
