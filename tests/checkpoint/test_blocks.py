"""What is loaded is what was checked: a bit that flips between a verification and a load is never loaded."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from synthetic import synthetic_checkpoint, synthetic_manifest

from dstrain.base.blocks import BlockDigests, BlockReader, DamagedBlockError, MappedFile
from dstrain.base.storage import Place, StoragePath, place
from dstrain.checkpoint import files
from dstrain.checkpoint.fragments import fragment_key
from dstrain.checkpoint.load import Pieces, Wanted
from dstrain.checkpoint.manifest import MANIFEST, Manifest
from dstrain.checkpoint.stored import DamagedError
from dstrain.checkpoint.targets import write_small
from dstrain.checkpoint.verify import verify

ELEMENTS = 20_000
BLOCK_BYTES = 1 << 14
FILE = "rank-00000.safetensors"


@pytest.fixture(params=["local", "remote"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A checkpoint of one parameter, on a disk and in a storage of fsspec's."""
    monkeypatch.setattr(files, "DIGEST_BYTES", BLOCK_BYTES)
    run: Place = tmp_path / "checkpoints" if request.param == "local" else place(f"memory://{uuid4().hex}")
    folder = run / "step-0000000003"
    if isinstance(folder, Path):
        folder.mkdir(parents=True)
    states = ["weight", "exp_avg", "exp_avg_sq"]
    saved = [(fragment_key("p", state, 0), torch.randn(ELEMENTS)) for state in states]
    written = files.write_safetensors(folder / FILE, saved)
    manifest = synthetic_manifest(3, {FILE: written.entry()})
    write_small(folder / MANIFEST, replace(manifest, parameters={"p": {"shape": [ELEMENTS], "states": states}}).text())
    yield folder
    if isinstance(folder, StoragePath):
        folder.remove_tree()


def flip(path: Place, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    if isinstance(path, Path):
        path.write_bytes(content)
    else:
        path.write_blocks(lambda: [bytes(content)], len(content))


@pytest.mark.parametrize("is_open", [False, True])
def test_a_bit_that_flips_after_a_verification_is_not_loaded(checkpoint: Place, is_open: bool) -> None:
    assert verify(checkpoint) == []
    manifest = Manifest.read(checkpoint)
    pieces = Pieces(checkpoint, manifest) if is_open else None
    flip(checkpoint / FILE, 2 * BLOCK_BYTES + 5)
    pieces = pieces or Pieces(checkpoint, manifest)
    wanted = [Wanted(torch.empty(ELEMENTS), "p", state, 0) for state in ("weight", "exp_avg", "exp_avg_sq")]
    with pytest.raises(DamagedError) as refusal:
        pieces.read(wanted)
    assert str(refusal.value) == (
        f"{checkpoint / FILE}: block 2 (bytes 32,768 to 49,152) is not what was written; restore the file from a copy"
    )


def test_what_lies_in_other_blocks_is_loaded(checkpoint: Place) -> None:
    manifest = Manifest.read(checkpoint)
    expected = torch.empty(100)
    Pieces(checkpoint, manifest).read_into(expected, "p", "weight", 0)
    flip(checkpoint / FILE, 9 * BLOCK_BYTES + 5)
    again = torch.empty(100)
    Pieces(checkpoint, manifest).read_into(again, "p", "weight", 0)
    assert torch.equal(expected, again)


def test_a_file_that_became_shorter_is_refused(checkpoint: Place) -> None:
    pieces = Pieces(checkpoint, Manifest.read(checkpoint))
    path = checkpoint / FILE
    content = path.read_bytes()[: 3 * BLOCK_BYTES + 1]
    if isinstance(path, Path):
        path.write_bytes(content)
    else:
        path.write_blocks(lambda: [content], len(content))
    with pytest.raises(DamagedError, match=r"block 3 "):
        pieces.read_into(torch.empty(ELEMENTS), "p", "weight", 0)


def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path) -> None:
    folder = synthetic_checkpoint(tmp_path, 3, world_size=1)
    manifest = Manifest.read(folder)
    saved = [(fragment_key("norm", s, 0), torch.tensor([1.0, float("nan"), float("inf"), 0, 0])) for s in ["weight"]]
    entry = files.write_safetensors(folder / FILE, saved).entry()
    damaged = replace(manifest, files={FILE: entry})
    with pytest.raises(DamagedError, match=rf"{FILE}: 2 values of norm weight are not finite"):
        Pieces(folder, damaged).read_into(torch.empty(5), "norm", "weight", 0)


def test_a_manifest_without_digests_of_blocks_is_refused(tmp_path: Path) -> None:
    folder = synthetic_checkpoint(tmp_path, 3, world_size=1)
    manifest = Manifest.read(folder)
    for change in ({"blocks": []}, {"blocks": ["xyz"]}, {"block_bytes": 0}):
        damaged = replace(manifest, files={FILE: manifest.files[FILE] | change})
        with pytest.raises(DamagedError, match=r"manifest.json: no sound digests of the blocks of rank-00000"):
            Pieces(folder, damaged)


def test_a_map_and_a_reader_refuse_the_same_block(tmp_path: Path) -> None:
    content = torch.randint(0, 256, (10_001,), dtype=torch.uint8).numpy().tobytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    import xxhash

    blocks = b"".join(xxhash.xxh3_128_digest(content[at : at + 1000]) for at in range(0, len(content), 1000))
    digests = BlockDigests(len(content), 1000, blocks)
    reader, mapped = BlockReader(tmp_path, {"file": digests}), MappedFile(path, digests)
    raw = bytearray(9001)
    reader.read_into("file", 1000, memoryview(raw))
    assert raw == content[1000:] == mapped.read(1000, 9001)
    assert mapped.checked == bytearray([0] + [1] * 10)
    flip(path, 10_000)
    for read in (lambda: BlockReader(tmp_path, {"file": digests}).read_into("file", 9999, memoryview(bytearray(2))),
                 lambda: MappedFile(path, digests).read(9999, 2)):  # fmt: skip
        with pytest.raises(DamagedBlockError, match=r"file: block 10 \(bytes 10,000 to 10,001\)"):
            read()
    with pytest.raises(ValueError, match="10001 bytes and not 10000"):
        MappedFile(path, BlockDigests(10_000, 1000, blocks[:160]))
