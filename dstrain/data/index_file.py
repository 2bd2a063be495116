"""How an index is written: one JSON object whose first two values are its version and the digest of what follows.

A column of numbers is `{"dtype": "uint32", "base64": …}`, the numbers as little-endian bytes of the smallest type that
holds them: a list of a million JSON numbers takes ten times the time and the memory.
"""

import base64
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dstrain.errors import CorpusError

INDEX_VERSION = 2
HEAD = re.compile(rb'\{"version":(\d+),"check":"([0-9a-f]{32})",')


def index_remedy(folder: Path, *, tokenizer: str | None = None) -> str:
    """The command that makes all indexes of a folder anew."""
    option = f" --tokenizer {shlex.quote(tokenizer)}" if tokenizer else ""
    return f"run `dstrain shards index {shlex.quote(str(folder))}{option}`"


def encode_column(values: NDArray[np.integer]) -> dict[str, str]:
    """A column of integers for an index."""
    smallest = np.result_type(np.min_scalar_type(values.min(initial=0)), np.min_scalar_type(values.max(initial=0)))
    packed = values.astype(smallest.newbyteorder("<")).tobytes()
    return {"dtype": smallest.name, "base64": base64.b64encode(packed).decode()}


def decode_column(column: Mapping[str, str]) -> NDArray[np.int64]:
    """The inverse of `encode_column`. Raises KeyError, TypeError or ValueError for something else."""
    packed = base64.b64decode(column["base64"], validate=True)
    return np.frombuffer(packed, np.dtype(column["dtype"]).newbyteorder("<")).astype(np.int64)


def write_index_file(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` at once: a reader sees the old file or the new one, also when several processes write the same.

    Raises OSError where the folder cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    rest = json.dumps(content, separators=(",", ":")).encode()[1:] + b"\n"
    try:
        with staging.open("wb") as file:
            file.write(b'{"version":%d,"check":"%s",' % (INDEX_VERSION, xxhash.xxh3_128_hexdigest(rest).encode()))
            file.write(rest)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def read_index_file(path: Path) -> dict[str, Any]:
    """An object written by `write_index_file`, less its head.

    Raises CorpusError when it is damaged or of another version, FileNotFoundError when there is none.
    """
    written = path.read_bytes()
    head = HEAD.match(written)
    if head is None:
        raise _of_another_version(path, written)
    if int(head[1]) != INDEX_VERSION:
        raise not_an_index(path, f"of version {int(head[1])}, not {INDEX_VERSION}")
    if xxhash.xxh3_128_hexdigest(memoryview(written)[head.end() :]) != head[2].decode():
        raise not_an_index(path, "damaged, or changed by hand: it does not fit its own digest")
    text = written.decode()
    del written, head  # an index of a million shards is worth it
    content: dict[str, Any] = json.loads(text)
    return content


def not_an_index(path: Path, reason: str) -> CorpusError:
    """The error of an index that cannot be used."""
    return CorpusError(f"{path}: not an index that can be used ({reason}); {index_remedy(path.parent)}")


def _of_another_version(path: Path, written: bytes) -> CorpusError:
    """Indexes of version 1 had no digests of blocks, and their number stood elsewhere."""
    try:
        content = json.loads(written)
        version = int(content["version"])
    except (ValueError, KeyError, TypeError):
        return not_an_index(path, "damaged, or another program's file")
    known = ", with --tokenizer and the tokenizer's folder" if content.get("tokenizer") else ""
    return CorpusError(
        f"{path}: an index of version {version}, which cannot check the bytes that are read; "
        f"{index_remedy(path.parent)}{known}"
    )
