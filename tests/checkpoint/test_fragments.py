import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_manifest

from dstrain.checkpoint.files import write_safetensors
from dstrain.checkpoint.fragments import Fragment, fragment_key, overlap, parse_fragment_key, share
from dstrain.checkpoint.load import Pieces, Wanted
from dstrain.checkpoint.verify import check_completeness
from dstrain.runtime.deepspeed_state import unpadded

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
        offset, count = unpadded(numel, padded, rank)
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


Topology = tuple[int, int]  # ZeRO stage, ranks
TOPOLOGIES = st.tuples(st.integers(0, 3), st.integers(1, 7))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), TOPOLOGIES, TOPOLOGIES)
@pytest.mark.slow
def test_what_any_topology_saves_any_other_loads(sizes: list[int], saving: Topology, loading: Topology) -> None:
    """Through real files: parameters of no element and of one, partitions that are uneven, padded or empty."""
    values = [torch.arange(size, dtype=torch.float32) + 100 * number for number, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), {}
        for rank in range(saving[1]):
            pieces = [piece for fragment in resident(values, saving, rank) for piece in fragment.pieces()]
            file = f"rank-{rank:05d}.safetensors"
            files[file] = write_safetensors(folder / file, pieces).entry()
        about = {f"p{number}": {"shape": [size], "states": ["weight"]} for number, size in enumerate(sizes)}
        manifest = replace(synthetic_manifest(1, files), parameters=about)
        assert check_completeness(folder, manifest) == []
        source = Pieces(folder, manifest)
        for rank in range(loading[1]):
            for fragment in resident(values, loading, rank):
                found = torch.full((fragment.numel,), -1.0)
                source.read([Wanted(found, fragment.parameter, "weight", fragment.offset)])
                assert torch.equal(found, fragment.states["weight"])


def resident(values: list[torch.Tensor], topology: Topology, rank: int) -> list[Fragment]:
    """What a rank holds, as DeepSpeed shares it out: see the docstring of `dstrain.checkpoint.fragments`."""
    stage, world = topology
    ends = stretches([len(value) for value in values])
    partition = -(-ends[-1][1] // world)  # of the line of all parameters, the last one padded
    found = []
    for number, value in enumerate(values):
        if stage == 0:
            start, stop = 0, len(value)
        elif stage == 3:
            start, count = unpadded(len(value), -(-len(value) // world), rank)
            stop = start + count
        else:
            first, last = overlap(ends[number], (rank * partition, (rank + 1) * partition))
            start, stop = first - ends[number][0], last - ends[number][0]
        if stop > start or stage == 0:
            owned = share(len(value), rank, world) if stage == 0 else (start, stop)
            found.append(Fragment(f"p{number}", start, stop - start, owned, {"weight": value[start:stop]}))
    return found


@given(st.text(min_size=1), st.sampled_from(["weight", "exp_avg"]), st.integers(0, 2**40))
def test_keys_are_read_as_they_were_written(parameter: str, state: str, offset: int) -> None:
    assert parse_fragment_key(fragment_key(parameter, state, offset)) == (parameter, state, offset)
