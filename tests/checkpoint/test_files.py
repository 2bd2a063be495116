import resource
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dstrain.base.durable import write_durably
from dstrain.checkpoint.files import write_safetensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 40)), min_size=1, max_size=12))
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[torch.dtype, int]]
) -> None:
    """Odd counts of narrow elements would misalign the wide ones behind them."""
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    tensors = {f"{i}|weight|0": torch.randint(0, 2, (count,)).to(dtype) for i, (dtype, count) in enumerate(described)}
    written = write_safetensors(path, tensors.items())
    assert (written.bytes, written.sha256) == (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
    read = load_file(path)
    assert read.keys() == tensors.keys()
    with safe_open(path, framework="pt") as file:
        for key, tensor in tensors.items():
            assert read[key].dtype == tensor.dtype
            assert torch.equal(read[key], tensor)
            assert torch.equal(file.get_slice(key)[1:], tensor[1:])


def test_views_are_written_as_their_elements(tmp_path: Path) -> None:
    line = torch.arange(20.0)
    write_safetensors(tmp_path / "a", [("a", line[3:7]), ("b", line[::5])])
    read = load_file(tmp_path / "a")
    assert read["a"].tolist() == [3, 4, 5, 6]
    assert read["b"].tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize("numel", [1, 1023, 1024, 50_000])
@pytest.mark.parametrize("folder", [None, "/dev/shm"])
def test_blocks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numel: int, folder: str | None) -> None:
    monkeypatch.setattr("dstrain.storages._streamed_file.BLOCK_BYTES", 1 << 14)
    tensors = {"a": torch.randn(numel), "b": torch.randn(70_001), "c": torch.randn(3)}
    with tempfile.TemporaryDirectory(dir=folder or tmp_path) as where:
        path = Path(where) / "a"
        written = write_safetensors(path, tensors.items())
        assert (written.bytes, written.sha256) == (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
        read = load_file(path)
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_safetensors(tmp_path / "none" / "a", [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_safetensors(tmp_path / "a", [("a", torch.zeros(1 << 20))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_is_a_sound_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", [])
    assert load_file(tmp_path / "a") == {}


def test_write_durably_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_durably(tmp_path / "latest", "one\n")
    write_durably(tmp_path / "latest", "two\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"latest": "two\n"}
