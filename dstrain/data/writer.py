"""Writes corpora: documents into numbered tar shards with their indexes.

The bytes depend on the documents alone (no times, no owners), so building the same corpus twice gives the same
digest. A shard appears under its name only when it is whole, and the folder's index only when all shards are.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dstrain.data.index import (
    CORPUS_INDEX_NAME,
    CorpusIndex,
    ShardSummary,
    ShardTable,
    write_corpus_index,
    write_shard_index,
)
from dstrain.data.scan import scan_shard
from dstrain.errors import CorpusError

DEFAULT_SHARD_BYTES = 64 * 2**20
DEFAULT_BLOCK_DOCUMENTS = 4096
LARGEST_UINT16 = 2**16 - 1


def write_text_shards(
    folder: Path, texts: Iterable[str], *, prefix: str = "train", shard_bytes: int = DEFAULT_SHARD_BYTES
) -> CorpusIndex:
    """Write one `.txt` sample in UTF-8 per document. Returns the index that was written beside the shards.

    Raises CorpusError if the folder has shards, or a text cannot be written as UTF-8.
    """
    writer = _ShardWriter(folder, prefix, shard_bytes)
    with writer.open():
        for text in texts:
            try:
                writer.add({"txt": text.encode("utf-8")})
            except UnicodeEncodeError as error:
                raise CorpusError(f"a text is not Unicode ({error}): {text[:60]!a}; repair the source") from error
    return writer.finish(tokenizer=None)


def write_token_shards(
    folder: Path,
    documents: Iterable[NDArray[np.integer]],
    *,
    vocab_size: int,
    tokenizer: str | None,
    prefix: str = "train",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    block_documents: int = DEFAULT_BLOCK_DOCUMENTS,
) -> CorpusIndex:
    """Write blocks of documents: `KEY.ids.npy` (uint16 where the vocabulary allows it) and `KEY.ends.npy`.

    The documents are token ids with the specials in; `tokenizer` is the digest of what made them. Returns the index
    that was written beside the shards. Raises CorpusError if the folder has shards.
    """
    dtype = np.dtype(np.uint16 if vocab_size - 1 <= LARGEST_UINT16 else np.uint32)
    writer = _ShardWriter(folder, prefix, shard_bytes)
    with writer.open():
        for block in _blocks(documents, block_documents, shard_bytes // dtype.itemsize):
            ends = np.cumsum([len(document) for document in block], dtype=np.int64)
            ids = np.concatenate(block).astype(dtype)
            writer.add({"ids.npy": _npy_bytes(ids), "ends.npy": _npy_bytes(ends)})
    return writer.finish(tokenizer)


def _blocks(
    documents: Iterable[NDArray[np.integer]], block_documents: int, block_tokens: int
) -> Iterator[list[NDArray[np.integer]]]:
    block: list[NDArray[np.integer]] = []
    tokens = 0
    for document in documents:
        block.append(document)
        tokens += len(document)
        if len(block) == block_documents or tokens >= block_tokens:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _npy_bytes(array: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class _ShardWriter:
    """Adds samples to `prefix-000000.tar`, and goes on to the next shard when one is full."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in folder.glob("*.tar")) + [
            path.name for path in [folder / CORPUS_INDEX_NAME] if path.exists()
        ]
        if present:
            raise CorpusError(
                f"{folder}: already holds {present[0]}; give an empty folder, so that two corpora do not mix"
            )
        self._folder, self._prefix, self._shard_bytes = folder, prefix, shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._summaries: list[ShardSummary] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Leave no half-written shard behind when the documents run out badly."""
        try:
            yield
            self._finish_shard()
        except OSError as error:
            raise CorpusError(
                f"{self._folder}: cannot be written ({error}); make room, or give another folder"
            ) from error
        finally:
            if self._tar is not None:
                self._tar.close()
                self._staging.unlink()

    @property
    def _shard(self) -> Path:
        return self._folder / f"{self._prefix}-{len(self._summaries):06d}.tar"

    @property
    def _staging(self) -> Path:
        return self._shard.with_name(f".{self._shard.name}.partial")

    def add(self, files: dict[str, bytes]) -> None:
        """Write one sample: extension → content."""
        if self._tar is None:
            self._tar = tarfile.open(self._staging, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in _finish_shard
            self._samples = 0
        key = f"{len(self._summaries):06d}-{self._samples:08d}"
        for extension, content in files.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._samples += 1
        if self._tar.offset >= self._shard_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        shard, staging = self._shard, self._staging
        staging.rename(shard)
        self._tar = None
        index = scan_shard(shard)
        write_shard_index(shard, index)
        self._summaries.append(index.summary)

    def finish(self, tokenizer: str | None) -> CorpusIndex:
        """Write the folder's index."""
        if not self._summaries:
            raise CorpusError(f"{self._folder}: there was no document to write; give sources that hold documents")
        index = CorpusIndex(ShardTable.of(self._summaries), tokenizer)
        write_corpus_index(self._folder, index)
        return index
