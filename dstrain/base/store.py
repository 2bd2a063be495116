"""Checkpoints in an object store: the part of `pathlib.Path` that they need, for any URL that fsspec knows.

Every request is repeated with growing pauses while its failure may pass; what does not pass is an OSError whose text
says what to do, so that whoever handles a full or missing disk handles a store as well. Objects appear whole or not at
all: an upload in parts that is not completed is not seen.
"""

import errno
import io
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from dstrain.errors import DISK_FULL

PART_BYTES = 1 << 24  # of an upload; more where a file would have more parts than a store allows
MOST_PARTS = 9000
READ_BYTES = 1 << 23
RETRY_AFTER_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # each more or less by half, so that ranks do not come together

# By name: these classes are of packages that are there only with the extra.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
_OUR_MISTAKES = {"ParamValidationError", "TypeError", "ValueError", "NotImplementedError"}
_NO_BUCKET = ("bucket does not exist", "NoSuchBucket", "container does not exist")
_FULL = ("QuotaExceeded", "StorageFull", "InsufficientStorage", "InsufficientCapacity")

T = TypeVar("T")


class StoreError(OSError):
    """A request that a store did not serve, for good. Its text says why and what to do."""

    def __init__(self, words: str) -> None:
        super().__init__(errno.EIO, words)


@dataclass(frozen=True)
class Stat:
    """What is known of an object."""

    st_size: int
    st_mtime: float


class StorePath:
    """A folder or an object, by its URL. Equal URLs are equal paths."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """The folder that it is in."""
        return StorePath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"StorePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: "StorePath") -> bool:
        return self.url < other.url

    # ------------------------------------------------------------ looking

    def stat(self) -> Stat:
        """Size and time of an object. Raises FileNotFoundError, or StoreError."""
        info = self._retried(lambda fs, path: fs.info(path))
        modified = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
        return Stat(int(info["size"] or 0), modified.timestamp() if isinstance(modified, datetime) else float(modified))

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        try:
            self._retried(lambda fs, path: fs.info(path))
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is anything below it."""
        return any(True for _ in self.iterdir())

    def is_file(self) -> bool:
        """Whether it is an object."""
        return self.exists() and not self.is_dir()

    def iterdir(self) -> Iterator["StorePath"]:
        """What is directly below it; nothing where there is nothing. Raises StoreError where there is no bucket."""

        def listed(fs: Any, path: str) -> list[str]:
            fs.invalidate_cache()
            return [str(entry) for entry in fs.ls(path, detail=False)]

        try:
            entries = self._retried(listed)
        except FileNotFoundError:
            return
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
        yield from (self / name for name in sorted(names - {self.name, ""}))

    def sizes(self) -> dict[str, int]:
        """Name → bytes of the objects that are directly below it."""

        def listed(fs: Any, path: str) -> dict[str, int]:
            fs.invalidate_cache()
            entries = fs.ls(path, detail=True)
            return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in entries}

        try:
            return self._retried(listed)
        except FileNotFoundError:
            return {}

    # ------------------------------------------------------------ reading

    def read_range(self, first: int, stop: int) -> bytes:
        """The bytes from `first` up to `stop`, in one request."""
        return self._retried(lambda fs, path: bytes(fs.cat_file(path, start=first, end=stop)))

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self._retried(lambda fs, path: bytes(fs.cat_file(path)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = -1) -> "StoreReader":
        """The object as a file to read, from its beginning to its end."""
        assert mode == "rb", mode
        return StoreReader(self)

    # ------------------------------------------------------------ writing

    def write_text(self, text: str) -> None:
        """Replace a small object."""
        self._retried(lambda fs, path: fs.pipe_file(path, text.encode()), missing_passes=True)

    def create_text(self, text: str) -> bool:
        """Write a small object where there is none; False: there is one. Of several who try, one does.

        A store that puts on no condition is looked at before instead: then two may, and the later one has it.
        """

        def create(fs: Any, path: str) -> bool:
            try:
                fs.pipe_file(path, text.encode(), mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.ENOSYS:
                    raise
                if fs.exists(path):
                    return False
                fs.pipe_file(path, text.encode())
            return True

        return self._retried(create, missing_passes=True)

    def write_blocks(self, blocks: Callable[[], Iterable[bytes | memoryview]], size: int) -> None:
        """Write an object in parts.

        Args:
            blocks: makes its content from the beginning; called again where an upload has to begin anew.
            size: of it all, in bytes.
        """

        def upload(fs: Any, path: str) -> None:
            file = fs.open(path, "wb", block_size=max(PART_BYTES, -(-size // MOST_PARTS)))
            try:
                for block in blocks():
                    file.write(block)
            except BaseException:
                _abandon(file)
                raise
            try:
                file.close()
            except BaseException:
                _abandon(file)
                raise

        self._retried(upload, missing_passes=True)

    def remove(self) -> None:
        """Remove an object, if it is there."""
        try:
            self._retried(lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            return

    def remove_tree(self) -> None:
        """Remove all that is below it."""
        for entry in list(self.iterdir()):
            entry.remove()

    def _retried(self, operation: Callable[[Any, str], T], *, missing_passes: bool = False) -> T:
        """Do it, again and again while that may help.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: everything else.
        """
        for pause in (*RETRY_AFTER_SECONDS, None):
            try:
                filesystem = _filesystem(self.url.partition("://")[0])
                return operation(filesystem, str(filesystem._strip_protocol(self.url)))
            except Exception as error:  # stores raise what their libraries raise
                if isinstance(error, FileNotFoundError) and not missing_passes and not _is_of_bucket(error):
                    raise
                words = _lasting(error)
                if words is None and pause is not None:
                    time.sleep(pause * random.uniform(0.5, 1.5))
                    continue
                tried = f"; tried {len(RETRY_AFTER_SECONDS) + 1} times, look after the store or the network"
                reason = str(error).strip() or type(error).__name__
                raise StoreError(words or f"the store does not answer: {reason}{tried}") from error
        raise AssertionError("the last try returns or raises")


Place = Path | StorePath


def sizes_in(folder: Place) -> dict[str, int]:
    """Name → bytes of the files that are directly in a folder. Of a store, in one request for a thousand of them."""
    if isinstance(folder, Path):
        return {path.name: path.stat().st_size for path in folder.iterdir()}
    return folder.sizes()


class StoreReader(io.RawIOBase):
    """An object as a file that is read from its beginning to its end."""

    def __init__(self, path: StorePath) -> None:
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
                raise StoreError(f"ends at byte {self._at:,} of {self._size:,}; it changed while it was read")
        start = self._at - self._first
        taken = self._block[start : start + len(buffer)]
        buffer[: len(taken)] = taken
        self._at += len(taken)
        return len(taken)


def place(text: str) -> Place:
    """A path, or a URL of a store."""
    return StorePath(text) if "://" in text else Path(text)


_making = threading.Lock()


def _filesystem(protocol: str) -> Any:
    """One client for all threads of this process: fsspec by itself would make one for each."""
    with _making:
        return _made(protocol, threading.main_thread().ident or 0)


@lru_cache
def _made(protocol: str, process: int) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = "pip install 'dstrain[s3]'" if protocol in ("s3", "s3a") else str(error)
        raise StoreError(f"what reads {protocol}:// is not installed ({extra})") from error
    except ValueError as error:
        raise StoreError(f"{protocol}:// is not known to fsspec: {error}") from error


def _lasting(error: Exception) -> str | None:
    """In words, what trying again does not help against; None: it may."""
    name, text = type(error).__name__, str(error).strip()
    if isinstance(error, StoreError):
        return error.strerror
    if name in _NO_CREDENTIALS:
        return f"there are no credentials for the store ({text}); set AWS_ACCESS_KEY_ID and its like, or a profile"
    if isinstance(error, PermissionError):
        return f"the store refuses these credentials ({text}); correct them, or allow them to list, read, write, delete"
    if _is_of_bucket(error):
        return f"{text}: create the bucket, or correct checkpoint.storage"
    if getattr(error, "errno", None) in DISK_FULL or any(word in text for word in _FULL):
        return f"no space left in the store ({text}); make room, or raise its quota"
    return f"{name}: {text}" if name in _OUR_MISTAKES else None


def _is_of_bucket(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) and any(words in str(error) for words in _NO_BUCKET)


def _abandon(file: Any) -> None:
    """Let go of an upload. Without that, the file's destructor would complete what is half there."""
    try:
        file.discard()
    except Exception:  # the store is away, as like as not
        pass
    finally:
        file.closed = True
