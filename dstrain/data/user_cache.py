"""The user's cache folder, where is kept what belongs beside shards whose own folder cannot be written.

    $XDG_CACHE_HOME or ~/.cache
      dstrain/counts/    tokens of texts (counts.py)
      dstrain/indexes/   indexes of shards and folders (locate.py)

All of it is named after the contents that it is about, or after path, size and times of a file. So it is never out of
date, several processes may write the same, and it may be removed at any time: then it is made again.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dstrain.base.environment import cache_home

_printed: set[str] = set()


def user_cache(*parts: str) -> Path | None:
    """A path in the cache folder; None for a user without a home."""
    folder = cache_home()
    return None if folder is None else folder.joinpath("dstrain", *parts)


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, as far as that can be known without making one."""
    return os.access(folder, os.W_OK, effective_ids=True)


def keep(write: Callable[[Path], None], path: Path | None, cached: Path | None) -> bool:
    """Write a file where it belongs, or else into the cache.

    Args:
        write: writes a path as a whole, and raises OSError where it cannot.
        path: where the file belongs; None for the cache alone.
        cached: its place in the cache, whose folders are made; None where there is no cache.

    Returns:
        Whether it was written.
    """
    if path is not None:
        with suppress(OSError):
            write(path)
            return True
    if cached is not None:
        with suppress(OSError):  # a read-only home, or a full one
            cached.parent.mkdir(parents=True, exist_ok=True)
            write(cached)
            return True
    return False


def warn_once(warning: str) -> None:
    """Print a warning to stderr, once in the life of this process."""
    if warning not in _printed:
        _printed.add(warning)
        print(f"warning: {warning}", file=sys.stderr)


def file_stamp(path: Path) -> str:
    """What a file's path, size and times are: others as soon as anybody writes to it. Raises OSError."""
    status = path.stat()
    return f"{path.resolve()}\n{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
