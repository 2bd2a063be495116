"""Where checkpoints, corpora and exports are kept: a disk, an object store, or what another package brings.

    s3://bucket/runs/bert/step-0000000500/manifest.json
    └ scheme: which `Storage`                └ `StoragePath`: the part of `pathlib.Path` that is needed, for any of them

A storage is one file of `dstrain/storages`, or an entry point of the group `dstrain.storages` whose name is its scheme.
Schemes that none of them has are fsspec's.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dstrain.base.registry import Registry

READ_BYTES = 1 << 23
Blocks = Callable[[], Iterable[bytes | memoryview]]  # makes a content from its beginning, as often as it is called


@dataclass(frozen=True)
class Stat:
    """What is known of an object: bytes, and seconds since 1970."""

    st_size: int
    st_mtime: float


class Storage(ABC):
    """Objects by their URL. A folder is what objects have in common up to a slash; it needs no making.

    Objects appear whole or not at all. One instance serves all threads of a process. What goes wrong for good is an
    OSError whose text says what to do; what may pass is tried again by the storage itself.

    `reads_at_once`: how many reads hide its latency; each holds some 8 MiB.
    """

    reads_at_once: ClassVar[int] = 8

    @abstractmethod
    def stat(self, url: str) -> Stat:
        """Size and time of an object. Raises FileNotFoundError where there is none, or OSError."""

    @abstractmethod
    def list(self, url: str) -> dict[str, int | None]:
        """Name → bytes of what is directly below a URL, None for a folder; empty where there is nothing.

        Raises OSError where that cannot be told: there is no such bucket, no permission.
        """

    @abstractmethod
    def read(self, url: str, first: int = 0, stop: int | None = None) -> bytes:
        """The bytes of an object from `first` up to `stop`, or to its end; fewer where it ends before.

        Raises FileNotFoundError or OSError.
        """

    @abstractmethod
    def write(self, url: str, blocks: Blocks, size: int) -> None:
        """Write or replace an object, so that it survives a crash once this has returned.

        Args:
            url: its name.
            blocks: makes the content from its beginning; called again where the storage has to begin anew. A block is
                the writer's again once the next one is asked for.
            size: of it all, in bytes.
        """

    @abstractmethod
    def create(self, url: str, content: bytes) -> bool:
        """Write a small object where there is none; False: there is one. Of several who try, one does."""

    @abstractmethod
    def remove(self, url: str) -> None:
        """Remove an object, if it is there."""


STORAGES: Registry[Storage] = Registry("storage", Storage, "dstrain.storages")


class StoragePath:
    """A folder or an object, by its URL. Equal URLs are equal paths."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def storage(self) -> Storage:
        """What it is in. Raises UserError where another package's cannot be used."""
        scheme = self.url.partition("://")[0]
        return STORAGES[scheme if scheme in STORAGES else "fsspec"]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "StoragePath":
        """The folder that it is in."""
        return StoragePath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "StoragePath":
        return StoragePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"StoragePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: "StoragePath") -> bool:
        return self.url < other.url

    def stat(self) -> Stat:
        """Size and time of an object. Raises FileNotFoundError, or OSError."""
        return self.storage.stat(self.url)

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        try:
            self.stat()
        except FileNotFoundError:
            return self.is_dir()
        return True

    def is_dir(self) -> bool:
        """Whether there is anything below it."""
        return bool(self.storage.list(self.url))

    def is_file(self) -> bool:
        """Whether it is an object."""
        return self.exists() and not self.is_dir()

    def iterdir(self) -> Iterator["StoragePath"]:
        """What is directly below it; nothing where there is nothing. Raises OSError where there is no bucket."""
        yield from (self / name for name in sorted(self.storage.list(self.url)))

    def read_range(self, first: int, stop: int) -> bytes:
        """The bytes from `first` up to `stop`, in one request."""
        return self.storage.read(self.url, first, stop)

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.storage.read(self.url)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = -1) -> "StorageReader":
        """The object as a file to read, from its beginning to its end."""
        assert mode == "rb", mode
        return StorageReader(self)

    def write_text(self, text: str) -> None:
        """Replace a small object."""
        content = text.encode()
        self.write_blocks(lambda: [content], len(content))

    def create_text(self, text: str) -> bool:
        """Write a small object where there is none; False: there is one. Of several who try, one does."""
        return self.storage.create(self.url, text.encode())

    def write_blocks(self, blocks: Blocks, size: int) -> None:
        """Write an object of `size` bytes, see `Storage.write`."""
        self.storage.write(self.url, blocks, size)

    def remove(self) -> None:
        """Remove an object, if it is there."""
        self.storage.remove(self.url)

    def remove_tree(self) -> None:
        """Remove all objects that are directly below it."""
        for entry in list(self.iterdir()):
            entry.remove()


class StorageReader(io.RawIOBase):
    """An object as a file that is read from its beginning to its end."""

    def __init__(self, path: StoragePath) -> None:
        super().__init__()
        self._path, self._size, self._at = path, path.stat().st_size, 0
        self._block, self._first = b"", 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the block that was fetched last reaches; 0 at the end."""
        if self._at >= self._size:
            return 0
        if self._at >= self._first + len(self._block):
            self._first = self._at
            self._block = self._path.read_range(self._at, min(self._at + READ_BYTES, self._size))
            if not self._block:
                raise OSError(f"{self._path} ends at byte {self._at:,} of {self._size:,}; it changed while it was read")
        start = self._at - self._first
        taken = self._block[start : start + len(buffer)]
        buffer[: len(taken)] = taken
        self._at += len(taken)
        return len(taken)


Place = Path | StoragePath


def place(text: str) -> Place:
    """A path, or a URL of a storage."""
    return StoragePath(text) if "://" in text else Path(text)


def storage_of(path: Place) -> tuple[Storage, str]:
    """The storage that a path is in, and its name there."""
    return (STORAGES["local"], str(path)) if isinstance(path, Path) else (path.storage, path.url)


def sizes_in(folder: Place) -> dict[str, int]:
    """Name → bytes of the files that are directly in a folder. Of a store, in one request for a thousand of them."""
    storage, url = storage_of(folder)
    return {name: size for name, size in storage.list(url).items() if size is not None}
