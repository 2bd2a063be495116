"""One pass over the bytes of a safetensors file: its digest, and how many of its numbers are not finite.

A block is read once, hashed, and looked at while it is still in the processor's cache. Imports no torch.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from typing import Any, BinaryIO

import numpy as np

from dstrain.base.storage import Place

Header = dict[str, dict[str, Any]]  # tensor name → dtype, shape, data_offsets
BLOCK_BYTES = 1 << 20

# Bits of a floating-point number that are all set if and only if it is infinite or not a number.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


@dataclass(frozen=True)
class Scanned:
    """The sha256 of a file, and of each tensor that has any, how many numbers are not finite."""

    sha256: str
    not_finite: dict[str, int]


def scan_file(path: Place, wanted: Callable[[str], bool]) -> Scanned:
    """Read a file once.

    Args:
        path: a safetensors file; of one whose header is damaged only the digest is taken.
        wanted: whether the numbers of the tensor of this name have to be finite.

    Raises:
        OSError: it cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    not_finite: dict[str, int] = {}
    with path.open("rb", buffering=0) as file:
        head = _read_head(file)
        digest.update(head)
        tensors = [t for t in _tensors(head) if wanted(t[0]) and t[1] in _EXPONENTS]
        start = current = 0  # of the block, counted from the header's end; the first tensor that may reach into it
        while count := _fill(file, block):
            digest.update(block[:count])
            while current < len(tensors) and tensors[current][3] <= start:
                current += 1
            for key, dtype, first, last in tensors[current:]:
                if first >= start + count:
                    break
                bad = _not_finite(block[max(first - start, 0) : min(last - start, count)], dtype)
                if bad:
                    not_finite[key] = not_finite.get(key, 0) + bad
            start += count
    return Scanned(digest.hexdigest(), not_finite)


def _read_head(file: RawIOBase | BinaryIO) -> bytes:
    """Length and header; less where the file is shorter or the length is absurd."""
    length = file.read(8)
    if len(length) < 8:
        return length
    (count,) = struct.unpack("<Q", length)
    return length + (file.read(count) if count < 1 << 30 else b"")


def parsed_header(head: bytes) -> Header:
    """The header in the first bytes of a file."""
    header: Header = json.loads(head[8:])
    header.pop("__metadata__", None)
    return header


def _tensors(head: bytes) -> list[tuple[str, str, int, int]]:
    """(name, dtype, first byte, byte after the last), in the order of the file; nothing of a damaged header."""
    tensors = []
    try:
        for key, about in parsed_header(head).items():
            first, last = about["data_offsets"]
            tensors.append((key, about["dtype"], int(first), int(last)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(tensors, key=lambda tensor: tensor[2])


def _fill(file: RawIOBase, block: memoryview) -> int:
    """Fill the block, less only at the file's end: then every number of an aligned file is whole in one block."""
    filled = 0
    while filled < len(block) and (count := file.readinto(block[filled:])):
        filled += count
    return filled


def count_not_finite(raw: memoryview, dtype: str) -> int:
    """How many numbers of a safetensors type are infinite or not a number; 0 where the type has none that are."""
    if dtype not in _EXPONENTS:
        return 0
    return sum(_not_finite(raw[first : first + BLOCK_BYTES], dtype) for first in range(0, len(raw), BLOCK_BYTES))


def _not_finite(raw: memoryview, dtype: str) -> int:
    kind, exponent = _EXPONENTS[dtype]
    if len(raw) % np.dtype(kind).itemsize:  # a file that nobody wrote so: its digest is wrong
        return 0
    if dtype == "F32" and bool(np.isfinite(np.frombuffer(raw, np.float32)).all()):  # the common case, in one fast pass
        return 0
    numbers = np.frombuffer(raw, kind)
    return int(np.count_nonzero((numbers & kind(exponent)) == exponent))
