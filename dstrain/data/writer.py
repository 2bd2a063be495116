"""Writes corpora: documents into numbered tar shards with their indexes.

The bytes depend on the documents alone (no times, no owners), so building the same corpus twice gives the same
digest. A shard appears under its name only when it is whole, and the folder's index only when all shards are; until
then the folder is marked as unfinished, which every reader refuses. A build that fails takes away what it wrote.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dstrain.data.index import (
    CORPUS_INDEX_NAME,
    CorpusIndex,
    ShardSummary,
    ShardTable,
    shard_index_path,
    write_corpus_index,
    write_shard_index,
)
from dstrain.data.locate import UNFINISHED_NAME, unfinished_build
from dstrain.data.scan import scan_shard
from dstrain.errors import CorpusError

DEFAULT_SHARD_BYTES = 64 * 2**20
DEFAULT_BLOCK_DOCUMENTS = 4096
LARGEST_UINT16 = 2**16 - 1
UNFINISHED_TEXT = "`dstrain shards build` is writing this folder, or was stopped before it ended.\n"


def write_text_shards(
    folder: Path, texts: Iterable[str], *, prefix: str = "train", shard_bytes: int = DEFAULT_SHARD_BYTES
) -> CorpusIndex:
    """Write one `.txt` sample in UTF-8 per document. Returns the index that was written beside the shards.

    Raises CorpusError if the folder has shards or cannot be written, or a text cannot be written as UTF-8.
    """
    with _ShardWriter(folder, prefix, shard_bytes) as writer:
        for text in texts:
            try:
                writer.add({"txt": io.BytesIO(text.encode("utf-8"))})
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
    that was written beside the shards. Raises CorpusError if the folder has shards or cannot be written.
    """
    dtype = np.dtype(np.uint16 if vocab_size - 1 <= LARGEST_UINT16 else np.uint32)
    narrow = (document.astype(dtype) for document in documents)
    with _ShardWriter(folder, prefix, shard_bytes) as writer:
        for block in _blocks(narrow, block_documents, shard_bytes // dtype.itemsize):
            ends = np.cumsum([len(document) for document in block], dtype=np.int64)
            writer.add({"ids.npy": _npy_file(block), "ends.npy": _npy_file([ends])})
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


def _npy_file(parts: Sequence[NDArray[np.integer]]) -> io.BytesIO:
    """A .npy file of arrays laid end to end, without another copy of them on the way."""
    file = io.BytesIO()
    description = {"descr": parts[0].dtype.str, "fortran_order": False, "shape": (sum(map(len, parts)),)}
    np.lib.format.write_array_header_1_0(file, description)
    for part in parts:
        file.write(np.ascontiguousarray(part).data)
    return file


class _ShardWriter:
    """Adds samples to `prefix-000000.tar`, and goes on to the next shard when one is full."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self._folder, self._prefix, self._shard_bytes = folder, prefix, shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._summaries: list[ShardSummary] = []

    def __enter__(self) -> Self:
        """Mark the folder as unfinished. Raises CorpusError if it holds a corpus or cannot be written."""
        mark = self._folder / UNFINISHED_NAME
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if mark.exists():
                raise unfinished_build(self._folder)
            present = sorted(path.name for path in self._folder.glob("*.tar"))
            present += [name for name in [CORPUS_INDEX_NAME] if (self._folder / name).exists()]
            if present:
                raise CorpusError(
                    f"{self._folder}: already holds {present[0]}; give an empty folder, so that two corpora do not mix"
                )
            mark.write_text(UNFINISHED_TEXT)
        except OSError as error:
            mark.unlink(missing_ok=True)
            raise self._cannot_be_written(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave nothing behind that is not whole."""
        if kind is None:
            return
        with suppress(OSError):
            self._remove_all()
        if isinstance(error, OSError):
            raise self._cannot_be_written(error) from error

    def _remove_all(self) -> None:
        if self._tar is not None:
            with suppress(OSError):
                self._tar.close()
        self._staging.unlink(missing_ok=True)
        for number in range(len(self._summaries) + 1):  # the last one may be without its index
            self._shard(number).unlink(missing_ok=True)
            shard_index_path(self._shard(number)).unlink(missing_ok=True)
        (self._folder / UNFINISHED_NAME).unlink()

    def _cannot_be_written(self, error: OSError) -> CorpusError:
        return CorpusError(f"{self._folder}: cannot be written ({error}); make room, or give another folder")

    def _shard(self, number: int) -> Path:
        return self._folder / f"{self._prefix}-{number:06d}.tar"

    @property
    def _staging(self) -> Path:
        return self._folder / f".{self._shard(len(self._summaries)).name}.partial"

    def add(self, files: dict[str, io.BytesIO]) -> None:
        """Write one sample: extension → content."""
        if self._tar is None:
            self._tar = tarfile.open(self._staging, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in _finish_shard
            self._samples = 0
        key = f"{len(self._summaries):06d}-{self._samples:08d}"
        for extension, content in files.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = content.getbuffer().nbytes
            content.seek(0)
            self._tar.addfile(member, content)
        self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        self._samples += 1
        if self._tar.offset >= self._shard_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        shard = self._shard(len(self._summaries))
        self._staging.rename(shard)
        index = scan_shard(shard)
        write_shard_index(shard, index)
        self._summaries.append(index.summary)

    def finish(self, tokenizer: str | None) -> CorpusIndex:
        """Write the folder's index and take the mark away."""
        self._finish_shard()
        if not self._summaries:
            raise CorpusError(f"{self._folder}: there was no document to write; give sources that hold documents")
        index = CorpusIndex(ShardTable.of(self._summaries), tokenizer)
        write_corpus_index(self._folder, index)
        (self._folder / UNFINISHED_NAME).unlink()
        return index
