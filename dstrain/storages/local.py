"""A local or a shared disk, by paths."""

import contextlib
import os
from pathlib import Path
from typing import ClassVar

from dstrain.base.durable import sync_folder
from dstrain.base.storage import Blocks, Stat, Storage


class LocalStorage(Storage):
    """Files. A file appears under its name by a rename, after it was flushed to the disk."""

    reads_at_once: ClassVar[int] = 2  # the system reads ahead as well

    def stat(self, url: str) -> Stat:
        """See `Storage`."""
        known = Path(url).stat()
        return Stat(known.st_size, known.st_mtime)

    def list(self, url: str) -> dict[str, int | None]:
        """See `Storage`."""
        try:
            with os.scandir(url) as entries:
                return {entry.name: None if entry.is_dir() else entry.stat().st_size for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, url: str, first: int = 0, stop: int | None = None) -> bytes:
        """See `Storage`."""
        with Path(url).open("rb", buffering=0) as file:
            last = os.fstat(file.fileno()).st_size if stop is None else stop
            content = os.pread(file.fileno(), last - first, first)
            parts = [content]
            while content and (missing := last - first - sum(map(len, parts))):  # a signal, or 2 GiB, ended the call
                parts.append(content := os.pread(file.fileno(), missing, last - missing))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, url: str, blocks: Blocks, size: int) -> None:
        """See `Storage`."""
        from dstrain.storages._streamed_file import StreamedFile  # imports torch, for a copy beside other threads

        path = Path(url)
        temporary = path.with_name(f".{path.name}.new")
        try:
            with StreamedFile(temporary) as file:
                for block in blocks():
                    file.write(block)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # before anybody looks at how much space is free
            raise
        sync_folder(path.parent)

    def create(self, url: str, content: bytes) -> bool:
        """See `Storage`."""
        path = Path(url)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # unlike a rename, it fails where there is one
            except FileExistsError:
                return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        return True

    def remove(self, url: str) -> None:
        """See `Storage`."""
        Path(url).unlink(missing_ok=True)


STORAGE = LocalStorage()
