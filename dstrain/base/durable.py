"""Small files and names that survive a crash. Imports no torch: commands that train nothing use it."""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash at any instant leaves the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
