"""Any URL that fsspec knows: object stores of all makers, HTTP, HDFS and more.

Every request is repeated with growing pauses while its failure may pass; what does not pass is an OSError whose text
says what to do, so that whoever handles a full or missing disk handles a store as well. Objects appear whole or not at
all: an upload in parts that is not completed is not seen.
"""

import errno
import random
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeVar

from dstrain.base.storage import Blocks, Stat, Storage
from dstrain.errors import DISK_FULL

PART_BYTES = 1 << 24  # of an upload; more where a file would have more parts than a store allows
MOST_PARTS = 9000
SMALL_BYTES = 1 << 20  # put in one request
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


class FsspecStorage(Storage):
    """Object stores, and all else that fsspec has a client for."""

    def stat(self, url: str) -> Stat:
        """See `Storage`."""
        info = self._retried(url, lambda fs, path: fs.info(path))
        modified = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
        return Stat(int(info["size"] or 0), modified.timestamp() if isinstance(modified, datetime) else float(modified))

    def list(self, url: str) -> dict[str, int | None]:
        """See `Storage`."""

        def listed(fs: Any, path: str) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return list(fs.ls(path, detail=True))

        try:
            entries = self._retried(url, listed)
        except FileNotFoundError:
            return {}
        own = ("", url.rpartition("/")[2])  # some stores have an object that stands for the folder itself
        named = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {
            name: None if entry["type"] == "directory" else int(entry["size"] or 0)
            for name, entry in named.items()
            if name not in own
        }

    def read(self, url: str, first: int = 0, stop: int | None = None) -> bytes:
        """See `Storage`. One request."""
        part = {} if first == 0 and stop is None else {"start": first, "end": stop}
        return self._retried(url, lambda fs, path: bytes(fs.cat_file(path, **part)))

    def write(self, url: str, blocks: Blocks, size: int) -> None:
        """See `Storage`. An upload in parts, if it is larger than one."""

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

        def put(fs: Any, path: str) -> None:
            fs.pipe_file(path, b"".join(blocks()))

        self._retried(url, upload if size > SMALL_BYTES else put, missing_passes=True)

    def create(self, url: str, content: bytes) -> bool:
        """See `Storage`.

        A store that puts on no condition is looked at before instead: then two may, and the later one has it.
        """

        def create(fs: Any, path: str) -> bool:
            try:
                fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.ENOSYS:
                    raise
                if fs.exists(path):
                    return False
                fs.pipe_file(path, content)
            return True

        return self._retried(url, create, missing_passes=True)

    def remove(self, url: str) -> None:
        """See `Storage`."""
        try:
            self._retried(url, lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            return

    def _retried(self, url: str, operation: Callable[[Any, str], T], *, missing_passes: bool = False) -> T:
        """Do it, again and again while that may help.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: everything else.
        """
        for pause in (*RETRY_AFTER_SECONDS, None):
            try:
                filesystem = _filesystem(url.partition("://")[0])
                return operation(filesystem, str(filesystem._strip_protocol(url)))
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


STORAGE = FsspecStorage()
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
