"""Pairs of texts in packed rows: what they are made of, whether they are labelled rightly, and that rows stay pure."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_support import global_steps, original_ids, sentences, stream_spec, write_small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dstrain.data.masking import NO_LABEL
from dstrain.data.packing import pack
from dstrain.data.pairs import Pairing, PairObjective, token_types
from dstrain.data.spec import StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.writer import write_text_shards
from dstrain.recipe.pair_slots import SHORTEST_PAIR, pair_slots

CLS, SEP, FIRST_ID = 2, 3, 5
OBJECTIVES: tuple[PairObjective, ...] = ("next_sentence", "sentence_order")

Rows = tuple[NDArray[np.int32], NDArray[np.int32]]  # input ids and position ids


def packed(lengths: list[int], rows: int, tokens: int) -> Rows:
    """Rows of documents of these lengths, over and over. Every token has an id of its own, but [CLS] and [SEP]."""
    documents: list[NDArray[np.int64]] = []
    total = 0
    while total < rows * tokens:
        length = min(lengths[len(documents) % len(lengths)], rows * tokens - total)
        document = np.arange(total, total + length) + FIRST_ID
        document[0], document[-1] = CLS, SEP
        documents.append(document)
        total += length
    return pack(documents, rows, tokens)


def paired(
    before: Rows, objective: PairObjective, tokens: int, row_numbers: NDArray[np.int64], seed: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Input ids, position ids and pairs."""
    ids, position_ids = before[0].copy(), before[1].copy()
    pairing = Pairing(objective, tokens, CLS, SEP, ids.shape[1], seed, "train")
    return ids, position_ids, pairing.make(ids, position_ids, row_numbers)


def undone(ids: NDArray[np.int32], pairs: NDArray[np.int32], objective: PairObjective) -> NDArray[np.int32]:
    """A row with what was moved put back by the plain rule; 0 for what was overwritten."""
    found = ids.copy()
    used = [pair for pair in pairs.tolist() if pair[2]]
    half = len(used) // 2
    for slot, (start, second, end, label) in enumerate(used):
        found[[start, second - 1, end - 1]] = 0
        if label != 1:
            continue
        if objective == "next_sentence":
            _, other, other_end, other_label = used[slot + half if slot < half else slot - half]
            assert other_label == 1 and other_end - other == end - second
            found[second : end - 1] = ids[other : other_end - 1]
        else:
            a, b = ids[start + 1 : second - 1], ids[second : end - 1]
            found[start + 1 : end - 1] = np.concatenate([b, [0], a])
    return found


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 6),
    tokens=st.integers(1, 150),
    lengths=st.lists(st.sampled_from([1, 2, 3, 15, 16, 17, 40, 70, 150, 400]), min_size=1, max_size=9),
    longest=st.integers(32, 90),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 2**40),
)
def test_every_rule_of_a_row(
    rows: int, tokens: int, lengths: list[int], longest: int, objective: PairObjective, seed: int
) -> None:
    before = packed(lengths, rows, tokens)
    ids, position_ids, pairs = paired(before, objective, longest, np.arange(rows) + seed, seed)
    types = token_types(pairs, tokens)
    assert pairs.shape == (rows, pair_slots(tokens), 4)
    for row in range(rows):
        used = [pair for pair in pairs[row].tolist() if pair[2]]
        assert pairs[row, len(used) :].tolist() == [[0, 0, 0, NO_LABEL]] * (pair_slots(tokens) - len(used))
        in_pairs, expected_types = np.zeros(tokens, bool), np.zeros(tokens, int)
        for start, second, end, _ in used:
            assert SHORTEST_PAIR <= end - start <= longest
            assert (ids[row, start], ids[row, second - 1], ids[row, end - 1]) == (CLS, SEP, SEP)
            text_of_a, text_of_b = second - start - 2, end - 1 - second
            assert text_of_a >= 3 and text_of_b >= 3
            assert not np.isin(ids[row, start + 1 : second - 1], [CLS, SEP]).any()
            assert not np.isin(ids[row, second : end - 1], [CLS, SEP]).any()
            assert (position_ids[row, start:end] == np.arange(end - start)).all()
            assert not in_pairs[start:end].any()
            in_pairs[start:end], expected_types[second:end] = True, 1
        assert (types[row] == expected_types).all()
        # What is in no pair stays as it was, and starts where it started.
        assert (ids[row] == before[0][row])[~in_pairs].all()
        assert (position_ids[row] == before[1][row])[~in_pairs].all()
        starts = np.append(np.flatnonzero(before[1][row] == 0), tokens)
        assert set(starts[:-1]) <= set(np.flatnonzero(position_ids[row] == 0))
        assert (np.diff(starts)[np.add.reduceat(~in_pairs, starts[:-1]) > 0] < SHORTEST_PAIR).all()
        # Labels are right: with what they say undone, only what was overwritten differs.
        original = undone(ids[row], pairs[row], objective)
        assert (original == before[0][row])[original != 0].all()
        assert (original == 0).sum() == 3 * len(used)
        labels = [label for *_, label in used]
        if objective == "next_sentence":
            half = len(used) // 2
            assert labels[:half] == labels[half : 2 * half]
            assert labels[2 * half :] == [NO_LABEL] * (len(used) % 2)
        else:
            assert NO_LABEL not in labels


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pairs_depend_on_seed_purpose_and_row_number_only(objective: PairObjective) -> None:
    before, numbers = packed([20, 70, 5, 40], 40, 128), np.arange(40)
    whole = paired(before, objective, 64, numbers)
    shuffled = np.random.default_rng(0).permutation(40)
    again = paired((before[0][shuffled], before[1][shuffled]), objective, 64, numbers[shuffled])
    for row in (0, 7):
        alone = paired((before[0][row : row + 1], before[1][row : row + 1]), objective, 64, numbers[row : row + 1])
        assert all((one[0] == every[row]).all() for one, every in zip(alone, whole, strict=True))
    assert all((one[shuffled] == other).all() for one, other in zip(whole, again, strict=True))
    assert (paired(before, objective, 64, numbers + 40)[2] != whole[2]).any()
    assert (paired(before, objective, 64, numbers, seed=1)[2] != whole[2]).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_are_changed_and_nothing_but_the_texts_tells_which(objective: PairObjective) -> None:
    """Lengths are drawn before labels: means of either label agree within 5 sigma, for A, B and the whole."""
    rows = 4000
    pairs = paired(packed([20, 70, 5, 40, 33], rows, 128), objective, 64, np.arange(rows))[2].reshape(-1, 4)
    pairs = pairs[pairs[:, 3] != NO_LABEL]
    draws = len(pairs) // (2 if objective == "next_sentence" else 1)  # a couple's label is drawn once
    assert abs((pairs[:, 3] == 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(draws)
    places = pairs[:, :3].astype(float)
    for length in (places[:, 1] - places[:, 0], places[:, 2] - places[:, 1], places[:, 2] - places[:, 0]):
        as_they_were, changed = length[pairs[:, 3] == 0], length[pairs[:, 3] == 1]
        sigma = length.std() * np.sqrt(4 / draws)
        assert abs(as_they_were.mean() - changed.mean()) < 5 * sigma


def test_the_other_text_is_of_another_document_unless_one_fills_half_of_the_row() -> None:
    """By documents of which none has more than two of a row's six pairs, and by one that has all of them."""
    for lengths, elsewhere in (([64, 32, 32, 64], True), ([10_000], False)):
        before = packed(lengths, 50, 192)
        ids, _, pairs = paired(before, "next_sentence", 32, np.arange(50))
        document = (before[1] == 0).cumsum(axis=1)
        changed = 0
        for row in range(50):
            document_of = dict(zip(before[0][row].tolist(), document[row].tolist(), strict=True))
            for start, _, end, label in pairs[row].tolist():
                a, b = (document_of[int(ids[row, place])] for place in (start + 1, end - 2))
                assert (a == b) == (label == 0 or not elsewhere)
                changed += label == 1
        assert changed > 100


# ---------------------------------------------------------------- in the stream


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    """Text shards of documents of up to 41 tokens, in rows of 96."""
    folder = tmp_path_factory.mktemp("texts")
    write_text_shards(folder / "shards", sentences(60), shard_bytes=20_000)
    tokenizer = str(write_small_tokenizer(folder / "tokenizer"))
    return stream_spec(folder / "shards", None, tokenizer=tokenizer, sequence_length=96)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.slow
def test_rows_with_pairs_are_the_same_for_every_world_and_after_a_restart(
    spec: StreamSpec, objective: PairObjective
) -> None:
    with_pairs = replace(spec, pair_objective=objective, pair_tokens=32)
    reference = list(global_steps(with_pairs, 1, 8))
    for world in (3, 8):
        for step, other in zip(reference, global_steps(with_pairs, world, 8), strict=True):
            assert step.rows == other.rows
            assert step.digest == other.digest
    resumed = global_steps(with_pairs, 5, 3, first_step=5, prefetch_steps=2)
    assert [step.digest for step in resumed] == [step.digest for step in reference[5:]]


def test_pairs_are_in_the_digest(spec: StreamSpec) -> None:
    plain = list(global_steps(spec, 1, 3))
    found = [list(global_steps(replace(spec, pair_objective=each, pair_tokens=32), 1, 3)) for each in OBJECTIVES]
    digests = {step.digest for steps in (plain, *found) for step in steps}
    assert len(digests) == 9
    labelled = replace(spec, pair_objective="sentence_order", pair_tokens=32)
    with RowStream(labelled, 0, 1) as stream:
        for rows in islice(stream, 3):
            assert rows.pairs.shape == (16, 6, 4)
            assert (rows.pairs[:, :, 3] != NO_LABEL).any(axis=1).all()
            ids = original_ids(rows)
            specials = np.zeros_like(ids, bool)
            for row, pairs in enumerate(rows.pairs.tolist()):
                for start, second, end, _ in pairs:
                    specials[row, [start, second - 1, end - 1]] |= end > 0
            assert np.isin(ids[specials], [CLS, SEP]).all()
            masked = np.zeros_like(specials)
            np.put_along_axis(masked, rows.masked_positions, rows.labels != NO_LABEL, axis=1)
            assert not (masked & specials).any()


def test_the_digests_of_steps_are_pinned(tmp_path: Path) -> None:
    """A change here is another law of the data: old runs could not be resumed."""
    write_text_shards(tmp_path / "shards", sentences(60), shard_bytes=20_000)
    tokenizer = str(write_small_tokenizer(tmp_path / "tokenizer"))
    steps = global_steps(stream_spec(tmp_path / "shards", None, tokenizer=tokenizer), 1, 2)
    assert [step.digest for step in steps] == [
        (-3869149278680930024, 8790104131318145607),
        (6844038275136003352, -2762960530960843376),
    ]
