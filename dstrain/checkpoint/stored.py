"""What a checkpoint's files hold, as its manifest states it: digests of their blocks, and their checked headers."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from dstrain.base.blocks import BlockDigests
from dstrain.base.storage import Place, storage_of
from dstrain.checkpoint.manifest import MANIFEST, Manifest
from dstrain.checkpoint.scan import Header, parsed_header
from dstrain.errors import CheckpointError

HEADERS_AT_ONCE = 16


class DamagedError(CheckpointError):
    """Bytes that are not what was written."""


def block_digests(folder: Place, manifest: Manifest) -> dict[str, BlockDigests]:
    """Those of each file. Raises DamagedError where the manifest has none that can be right."""
    digests = {}
    for name, stated in manifest.files.items():
        try:
            blocks = bytes.fromhex("".join(stated["blocks"]))
            digests[name] = BlockDigests(stated["bytes"], stated["block_bytes"], blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{folder / MANIFEST}: no sound digests of the blocks of {name} ({error})") from error
    return digests


def checked_header(folder: Place, name: str, stated: dict[str, Any]) -> tuple[int, Header]:
    """The bytes before the first tensor, and the header of a safetensors file.

    Raises:
        DamagedError: it is not what was written.
        OSError: it cannot be read.
    """
    size, digest = stated["head"]
    storage, url = storage_of(folder / name)
    head = storage.read(url, 0, size)
    if xxhash.xxh3_128_hexdigest(head) != digest:
        raise DamagedError(f"{folder / name}: its header changed since it was written")
    return size, parsed_header(head)


def checked_headers(folder: Place, manifest: Manifest) -> dict[str, tuple[int, Header]]:
    """Those of all files."""
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        read = pool.map(lambda name: checked_header(folder, name, manifest.files[name]), manifest.files)
        return dict(zip(manifest.files, read, strict=True))
