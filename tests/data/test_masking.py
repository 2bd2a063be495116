import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dstrain.data.masking import MEAN_SPAN_WORDS, NO_LABEL, Masker, Unit, Vocabulary
from dstrain.data.spec import masked_per_row

VOCABULARY = Vocabulary(size=1000, mask_id=4, special_ids=(0, 1, 2, 3, 4, 999))
BERT = (0.8, 0.1, 0.1)
CONTINUING = np.arange(600, 999)  # pieces that go on with a word

Masked = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]


def mask(
    ids: NDArray[np.int32],
    row_numbers: NDArray[np.int64],
    rate: float = 0.15,
    replace: tuple[float, float, float] = BERT,
    seed: int = 0,
    purpose: str = "train",
    unit: Unit = "token",
) -> Masked:
    """Inputs, positions and labels."""
    tokens = ids.shape[1]
    masker = Masker(VOCABULARY, tokens, masked_per_row(rate, tokens), replace, seed, purpose, unit, CONTINUING)
    inputs = ids.copy()
    positions, labels = masker.mask(inputs, row_numbers)
    return inputs, positions, labels


def ordinary_rows(rows: int, tokens: int) -> NDArray[np.int32]:
    return np.random.default_rng(1).integers(5, 999, (rows, tokens), dtype=np.int32)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    tokens=st.integers(1, 65),
    rate=st.floats(0.01, 0.99),
    special_share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
    unit=st.sampled_from(["token", "word", "span"]),
)
def test_every_rule_of_a_row(rows: int, tokens: int, rate: float, special_share: float, seed: int, unit: Unit) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 999, (rows, tokens), dtype=np.int32)
    ids[rng.random((rows, tokens)) < special_share] = 2
    inputs, positions, labels = mask(ids, np.arange(rows) + seed, rate, seed=seed, unit=unit)
    wanted = masked_per_row(rate, tokens)
    assert positions.shape == labels.shape == (rows, wanted)
    for row in range(rows):
        candidates = int((ids[row] != 2).sum())
        count = min(wanted, candidates)
        assert (np.diff(positions[row, :count]) > 0).all()
        assert (labels[row, :count] == ids[row, positions[row, :count]]).all()
        assert (labels[row, :count] != 2).all()
        assert (labels[row, count:] == NO_LABEL).all() and (positions[row, count:] == 0).all()
        untouched = np.setdiff1d(np.arange(tokens), positions[row, :count])
        assert (inputs[row, untouched] == ids[row, untouched]).all()
        drawn = inputs[row, positions[row, :count]]
        assert not np.isin(drawn, [0, 1, 2, 3, 999]).any()


def test_a_mask_depends_on_seed_purpose_and_row_number_only() -> None:
    ids = ordinary_rows(100, 64)
    numbers = np.arange(100)
    inputs, positions, labels = mask(ids, numbers)
    shuffled = np.random.default_rng(0).permutation(100)
    again = mask(ids[shuffled], numbers[shuffled])
    assert (inputs[shuffled] == again[0]).all()
    assert (positions[shuffled] == again[1]).all()
    assert (labels[shuffled] == again[2]).all()
    assert (mask(ids, numbers, seed=1)[1] != positions).any()
    assert (mask(ids, numbers, purpose="valid")[1] != positions).any()


def test_every_epoch_has_new_masks() -> None:
    """The same row under two numbers shares no more positions than chance allows: 154 of 512 squared is 46 ± 5.7."""
    ids = np.repeat(ordinary_rows(1, 512), 200, axis=0)
    _, positions, _ = mask(ids, np.arange(200) * 1_000_003, rate=0.3)
    shared = [len(np.intersect1d(positions[row], positions[row + 1])) for row in range(199)]
    assert abs(np.mean(shared) - 154 * 154 / 512) < 6 * 5.7 / np.sqrt(199)
    assert max(shared) < 46 + 6 * 5.7


def test_shares_of_mask_random_and_kept() -> None:
    ids = ordinary_rows(4000, 128)
    inputs, positions, labels = mask(ids, np.arange(4000), rate=0.15)
    seen = np.take_along_axis(inputs, positions, axis=1)
    total = labels.size
    masked, kept = int((seen == 4).sum()), int((seen == labels).sum())
    for count, share in ((masked, 0.8), (kept, 0.1 + 0.1 / 994), (total - masked - kept, 0.1 * 993 / 994)):
        assert abs(count - share * total) < 5 * np.sqrt(total * share * (1 - share))


@pytest.mark.parametrize(("replace", "share_changed"), [((1.0, 0.0, 0.0), 1.0), ((0.0, 0.0, 1.0), 0.0)])
def test_extreme_shares_are_exact(replace: tuple[float, float, float], share_changed: float) -> None:
    ids = ordinary_rows(50, 64)
    inputs, positions, labels = mask(ids, np.arange(50), replace=replace)
    seen = np.take_along_axis(inputs, positions, axis=1)
    assert (seen != labels).mean() == share_changed


@pytest.mark.parametrize(("unit", "rows"), [("token", 5000), ("word", 40_000), ("span", 40_000)])
def test_positions_are_uniform(unit: Unit, rows: int) -> None:
    """Chi-square over 128 positions, drawn without replacement, so scaled by (L-1)/(L-K). p = 1e-6 at 213.

    Neighbours in a unit are masked together, which widens a count no more than it narrows others: the mean stays 127.
    With units cut where K is reached, the first three positions of a row were masked too often: 1,300 for spans.
    """
    _, positions, _ = mask(ordinary_rows(rows, 128), np.arange(rows), rate=0.15, unit=unit)
    counts = np.bincount(positions.ravel(), minlength=128)
    expected = positions.size / 128
    chi_square = ((counts - expected) ** 2 / expected).sum() * 127 / (128 - 19)
    assert chi_square < (213 if unit == "token" else 250)


def test_random_tokens_are_uniform_over_the_ordinary_vocabulary() -> None:
    """Chi-square over 994 ids; p = 1e-6 at 1216."""
    inputs, positions, _ = mask(ordinary_rows(5000, 128), np.arange(5000), rate=0.3, replace=(0.0, 1.0, 0.0))
    drawn = np.take_along_axis(inputs, positions, axis=1).ravel()
    counts = np.bincount(drawn, minlength=1000)
    assert counts[[0, 1, 2, 3, 4, 999]].sum() == 0
    expected = drawn.size / 994
    assert ((counts[5:999] - expected) ** 2 / expected).sum() < 1216


def test_a_step_may_mask_fewer_than_there_is_room_for() -> None:
    masker = Masker(VOCABULARY, 64, 20, BERT, 0, "train", "span", CONTINUING)
    ids = ordinary_rows(10, 64)
    positions, labels = masker.mask(ids.copy(), np.arange(10), 7)
    assert positions.shape == labels.shape == (10, 20)
    assert (labels[:, :7] != NO_LABEL).all() and (labels[:, 7:] == NO_LABEL).all() and not positions[:, 7:].any()


# ---------------------------------------------------------------- words and spans


def words_of(row: NDArray[np.int32]) -> list[list[int]]:
    """Positions of each word of a row, by the plain rule."""
    words: list[list[int]] = []
    for place, token in enumerate(row.tolist()):
        if token in VOCABULARY.special_ids:
            continue
        goes_on = place > 0 and token in CONTINUING and int(row[place - 1]) not in VOCABULARY.special_ids
        if goes_on:
            words[-1].append(place)
        else:
            words.append([place])
    return words


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 65), rate=st.floats(0.05, 0.9), seed=st.integers(0, 2**40), special=st.floats(0, 0.5))
def test_words_are_masked_whole_but_for_two(tokens: int, rate: float, seed: int, special: float) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 999, (8, tokens), dtype=np.int32)
    ids[rng.random(ids.shape) < special] = 2
    _, positions, labels = mask(ids, np.arange(8), rate, seed=seed, unit="word")
    for row in range(8):
        masked = set(positions[row, labels[row] != NO_LABEL].tolist())
        cut = [word for word in words_of(ids[row]) if 0 < len(masked & set(word)) < len(word)]
        assert len(cut) <= 2


def test_long_and_short_words_are_masked_alike() -> None:
    """As many of the tokens of words of one token as of words of three, the first as often as the last."""
    pattern = [10, 20, 700, 701]
    ids = np.tile(np.array(pattern * 128, np.int32), (1000, 1))
    _, positions, labels = mask(ids, np.arange(1000), rate=0.3, unit="word")
    kinds = np.bincount(positions[labels != NO_LABEL] % 4, minlength=4) / (1000 * 128)
    assert np.abs(kinds - 0.3).max() < 0.006


def test_spans_are_as_long_as_spanberts() -> None:
    """Words between the beginnings of two neighbouring spans, over rows of words of one piece: geometric."""
    masker = Masker(VOCABULARY, 512, 77, BERT, 0, "train", "span", CONTINUING)
    ids = np.random.default_rng(1).integers(5, 600, (400, 512), dtype=np.int32)
    from dstrain.base.counter_rng import draws, stream_key

    starts = masker._unit_starts(ids, draws(stream_key(0, "x"), np.arange(400, dtype=np.uint64))[:, None])
    lengths = np.concatenate([np.diff(np.unique(row)) for row in starts])
    assert abs(lengths.mean() - MEAN_SPAN_WORDS) < 6 * np.sqrt(MEAN_SPAN_WORDS * (MEAN_SPAN_WORDS - 1) / len(lengths))
    assert abs((lengths == 1).mean() - 1 / MEAN_SPAN_WORDS) < 0.01
    _, positions, _ = mask(ids, np.arange(400), unit="span")
    neighbours = (np.diff(positions, axis=1) == 1).mean()
    alone = (np.diff(mask(ids, np.arange(400))[1], axis=1) == 1).mean()
    assert neighbours > 3 * alone
