"""Small files of an attempt, which are there whole or not at all, also on a full disk. Standard library only."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dstrain.errors import DISK_FULL

RESERVE = "reserve"  # a file in an attempt's folder
RESERVE_BYTES = 1 << 17


def read_status(run_dir: Path, attempt: int) -> dict[str, Any]:
    """The newest status that `attempt` wrote, on whichever node, or {} if it has written none yet."""
    newest: dict[str, Any] = {}
    for file in (run_dir / "status").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            status = json.loads(file.read_text())
            if isinstance(status, dict) and status.get("attempt") == attempt:
                newest = max(newest, status, key=lambda content: content.get("time_unix") or 0.0)
    return newest


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `path` as a whole or not at all. On a full disk the attempt's reserve makes room for it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    for reserve in (path.parent / RESERVE, path.parent.parent / RESERVE, None):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in DISK_FULL or reserve is None:
                raise
            reserve.unlink(missing_ok=True)


def keep_reserve(attempt_folder: Path) -> None:
    """Take some room on the disk, so that an attempt which fills it can still say so."""
    attempt_folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError), (attempt_folder / RESERVE).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
