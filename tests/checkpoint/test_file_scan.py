"""One pass over a file: its digest is sha256's, and every number that is not finite is counted where it lies."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.checkpoint import scan
from dstrain.checkpoint.files import write_safetensors
from dstrain.checkpoint.scan import scan_file

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BAD = [float("nan"), float("inf"), float("-inf")]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*FLOATS, torch.int64, torch.uint8]),
            st.integers(0, 50),
            st.lists(st.tuples(st.integers(0, 49), st.sampled_from(BAD)), max_size=4),
        ),
        max_size=6,
    ),
    st.sampled_from([8, 64, 1 << 20]),
)
@pytest.mark.slow
def test_every_number_that_is_not_finite_is_counted_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    described: list[tuple[torch.dtype, int, list[tuple[int, float]]]],
    block_bytes: int,
) -> None:
    tensors, expected = {}, {}
    for index, (dtype, numel, bad) in enumerate(described):
        largest = torch.finfo(dtype).max if dtype.is_floating_point else 1
        tensor = torch.full((numel,), largest, dtype=dtype)  # all but the last exponent bit, and all of the mantissa
        if dtype.is_floating_point:
            for place, value in bad:
                tensor[place:][:1] = value
            if count := int((~torch.isfinite(tensor)).sum()):
                expected[f"p{index}|weight|0"] = count
        tensors[f"p{index}|weight|0"] = tensor
    path = tmp_path_factory.mktemp("scan") / "a.safetensors"
    write_safetensors(path, tensors.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BLOCK_BYTES", block_bytes)
        scanned = scan_file(path, lambda key: True)
        assert scan_file(path, lambda key: False).not_finite == {}
    assert scanned.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert scanned.not_finite == expected


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]xyz", b"\x09\0\0\0\0\0\0\0{"])
def test_of_a_damaged_header_the_digest_is_taken(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    scanned = scan_file(path, lambda key: True)
    assert (scanned.sha256, scanned.not_finite) == (hashlib.sha256(content).hexdigest(), {})
