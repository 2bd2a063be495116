"""How often each token was read, against counting them one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.lanes import SourceLanes
from dstrain.data.shards import Corpus
from dstrain.data.spec import PhaseSpec, SourceSpec, StreamSpec
from dstrain.data.writer import write_token_shards
from dstrain.proof.coverage import Ranges, line_ranges, times_read, without

LENGTHS = (3, 40, 1, 7, 90, 2, 2, 33, 5, 60, 11, 4, 150, 8, 9, 23)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    documents = (np.full(length, number) for number, length in enumerate(LENGTHS))
    write_token_shards(folder, documents, vocab_size=99, tokenizer="none", shard_bytes=4096, block_documents=3)
    return Corpus.open(str(folder))


@settings(deadline=None, max_examples=150)
@given(st.data())
@pytest.mark.slow
def test_counts_are_those_of_counting_one_by_one(corpus: Corpus, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    phase = PhaseSpec(0, None, count, 8, (0.1, 0.1), (1.0,))
    seed = data.draw(st.integers(0, 3))
    spec = StreamSpec((SourceSpec("a", "a"),), (phase,), count, seed, None, shuffle_window=2)
    lanes = SourceLanes(corpus, spec)
    base = data.draw(st.integers(0, 3 * corpus.total_tokens // count))
    read = np.array([base + data.draw(st.integers(0, 40)) for _ in range(count)])
    seen = np.zeros(corpus.total_tokens, np.int64)
    for lane, position in enumerate(read.tolist()):
        ranges = line_ranges(lanes, lane, 0, position)
        assert ranges.tokens == position
        for first, last in zip(ranges.firsts.tolist(), ranges.lasts.tolist(), strict=True):
            seen[first:last] += 1
    counts, exact = times_read(lanes, read)
    assert (counts, exact) == (Counter(seen.tolist()), True)

    stretches = {}  # of some lanes, which were passed over
    for lane in data.draw(st.sets(st.integers(0, count - 1), max_size=3)):
        ends = [data.draw(st.integers(0, int(read[lane]))) for _ in range(2)]
        stretches[lane] = min(ends), max(ends)
    dropped = Ranges.join(line_ranges(lanes, lane, first, last) for lane, (first, last) in stretches.items())
    for first, last in zip(dropped.firsts.tolist(), dropped.lasts.tolist(), strict=True):
        seen[first:last] -= 1
    assert without(counts, lanes, read, dropped) == Counter(seen.tolist())
