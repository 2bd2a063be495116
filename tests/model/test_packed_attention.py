"""Documents packed into a row are strangers: none sees another, and each sees itself as if it were alone."""

import pytest
import torch
from tiny_models import ARCHITECTURES, FIRST_ID, SPECIAL_IDS, VOCABULARY, packed_rows, recipe_model, tiny_model

from dstrain.architectures import document_mask
from dstrain.model.encoder import build_model, encode_packed, predict_tokens

LENGTHS = ((5, 17, 10), (1, 30, 1), (32,))  # in every row a document longer than modernbert's window
EVERY = [(architecture, attention) for architecture in ARCHITECTURES for attention in ("sdpa", "matmul", "eager")]


@pytest.mark.parametrize(("architecture", "attention"), EVERY)
@torch.no_grad()
@pytest.mark.slow
def test_changing_one_document_never_changes_anothers_logits(architecture: str, attention: str) -> None:
    model = tiny_model(architecture, attention=attention)
    input_ids, position_ids = packed_rows(*LENGTHS)
    before = predict_tokens(model, encode_packed(model, input_ids, position_ids))
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            mine = slice(start, start + length)
            changed = input_ids.clone()
            changed[row, mine] = FIRST_ID + (changed[row, mine] - FIRST_ID + 7) % (VOCABULARY - FIRST_ID)
            after = predict_tokens(model, encode_packed(model, changed, position_ids))
            same = torch.ones_like(input_ids, dtype=torch.bool)
            same[row, mine] = False
            assert torch.equal(after[same], before[same])
            assert not torch.isclose(after[~same], before[~same]).all(dim=-1).any()
            start += length


@pytest.mark.parametrize(("architecture", "attention"), EVERY)
@torch.no_grad()
@pytest.mark.slow
def test_a_packed_document_is_encoded_as_if_alone(architecture: str, attention: str) -> None:
    """Plain Transformers on each document: this also proves position ids, RoBERTa's offset and the sliding window."""
    model = tiny_model(architecture, attention=attention)
    input_ids, position_ids = packed_rows(*LENGTHS)
    packed = encode_packed(model, input_ids, position_ids)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            mine = slice(start, start + length)
            alone = model.base_model(input_ids=input_ids[row : row + 1, mine]).last_hidden_state[0]
            torch.testing.assert_close(packed[row, mine], alone, rtol=1e-5, atol=2e-6)
            start += length


@torch.no_grad()
def test_modernberts_window_is_shorter_than_the_rows_of_these_tests() -> None:
    """Without local layers the hidden states differ, so the tests above would notice a lost window."""
    model = tiny_model("modernbert")
    input_ids, position_ids = packed_rows((32,))
    windowed = encode_packed(model, input_ids, position_ids)
    model.config.sliding_window = 32
    assert not torch.allclose(encode_packed(model, input_ids, position_ids), windowed, atol=1e-3)


def test_document_mask() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 0, 1]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_seed_decides_the_initial_weights(architecture: str) -> None:
    built = [build_model(recipe_model(architecture), seed, SPECIAL_IDS) for seed in (1, 1, 2)]
    first, again, other = (dict(model.named_parameters()) for model in built)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)
    assert built[0].config.pad_token_id == SPECIAL_IDS["pad_token_id"]
