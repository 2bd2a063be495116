"""Reads one tar shard from end to end and says what is in it. A doubt is an error: no document is lost silently.

Samples are grouped as WebDataset does it: the key is the path up to the first dot of the file's name, what follows is
the extension. Unlike WebDataset, files of a sample need not stand side by side. A text sample is `KEY.txt`, or a
field of `KEY.json`. A token block is `KEY.ids.npy` (uint16 or uint32: many documents end to end) with `KEY.ends.npy`
(int64: where each of them ends).
"""

import io
import mmap
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from dstrain.data.index import (
    DIGEST_BLOCK_BYTES,
    TEXT_COLUMNS,
    TOKEN_COLUMNS,
    IdType,
    ShardIndex,
    ShardSummary,
)
from dstrain.errors import CorpusError

TAR_BLOCK_BYTES = 512
COMPRESSED_MAGIC = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ\x00": "unxz",
    b"BZh": "bunzip2",
    b"\x04\x22\x4d\x18": "unlz4",
}
# WebDataset's own rules: what is a key, and which members are notes of the tool that made the tar.
SAMPLE_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
NOTE_NAME = re.compile(r"__[^/]*__($|/)")
MAGIC_BYTES = 128  # more than any .npy header of a one-dimensional array needs

Payload = tuple[int, int]  # byte offset and size in the tar
Samples = dict[str, dict[str, Payload]]  # key → role → payload


def scan_shard(path: Path) -> ShardIndex:
    """Index one shard by reading it once. Raises CorpusError naming the shard, the place and the remedy."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CorpusError(f"{path}: an empty file, not a tar; make the shard again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closes itself when the last view of it goes
        _refuse_compressed(path, mapped)
    digest, block_digests = _digests(mapped)
    samples = _read_members(path, mapped)
    kinds = {"tokens" if "ids" in roles or "ends" in roles else "text" for roles in samples.values() if roles}
    if len(kinds) == 2:
        raise CorpusError(f"{path}: holds both text samples and token blocks; put them into separate shards")
    if samples and not kinds:
        first = next(iter(samples))
        raise CorpusError(
            f"{path}: none of its {len(samples)} samples has a .txt, .json or .ids.npy file (first key: {first!r}); "
            "give the folder of the shards that hold the text"
        )
    if kinds == {"tokens"}:
        samples = {key: roles for key, roles in samples.items() if roles}
        columns, tokens, max_id, dtype = _token_columns(path, mapped, samples)
        documents = int(columns["block_documents"].sum())
        summary = ShardSummary(path.name, len(mapped), digest, "tokens", documents, tokens, max_id, dtype)
    else:
        columns = _text_columns(samples)
        summary = ShardSummary(path.name, len(mapped), digest, "text", len(samples), None, None, None)
    return ShardIndex(summary, DIGEST_BLOCK_BYTES, block_digests, "\0".join(samples), columns)


def _digests(mapped: mmap.mmap) -> tuple[str, bytes]:
    """The digest of the whole shard, and those of its blocks end to end."""
    whole, blocks = xxhash.xxh3_128(), []
    with memoryview(mapped) as view:
        for start in range(0, len(view), DIGEST_BLOCK_BYTES):
            with view[start : start + DIGEST_BLOCK_BYTES] as block:
                whole.update(block)
                blocks.append(xxhash.xxh3_128_digest(block))
    return whole.hexdigest(), b"".join(blocks)


def _refuse_compressed(path: Path, mapped: mmap.mmap) -> None:
    for magic, program in COMPRESSED_MAGIC.items():
        if mapped[: len(magic)] == magic:
            raise CorpusError(
                f"{path}: compressed, so no document can be read by its place; decompress it with `{program}`"
            )


def _read_members(path: Path, mapped: mmap.mmap) -> Samples:
    samples: Samples = {}
    payloads: dict[str, Payload] = {}  # of all files: what hard links point at
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if NOTE_NAME.match(member.name):
                    continue
                payload = _payload(path, member, payloads)
                if payload is not None:
                    payloads[member.name] = payload
                    _add(path, samples, member.name, payload)
            _check_end(path, mapped, tar.offset)
    except tarfile.TarError as error:
        raise CorpusError(f"{path}: truncated or damaged tar ({error}); copy or make the shard again") from error
    return samples


def _payload(path: Path, member: tarfile.TarInfo, payloads: Mapping[str, Payload]) -> Payload | None:
    """Where a member's bytes lie; None for a folder, a device or a link that is no sample."""
    if member.islnk() and member.linkname in payloads:
        return payloads[member.linkname]
    if (member.islnk() or member.issym()) and _role(member.name) is not None:
        raise CorpusError(
            f"{path}: {member.name!r} is a link to {member.linkname!r}, not a file; make the tar with `tar "
            "--dereference --hard-dereference`"
        )
    if member.issparse():
        raise CorpusError(f"{path}: {member.name!r} is stored as a sparse file; make the tar without `--sparse`")
    return (member.offset_data, member.size) if member.isreg() else None


def _role(name: str) -> Literal["txt", "json", "ids", "ends"] | None:
    match = SAMPLE_NAME.fullmatch(name)
    extension = "." + match[2].lower() if match else ""
    if extension.endswith(".ids.npy"):
        return "ids"
    if extension.endswith(".ends.npy"):
        return "ends"
    if extension.endswith(".txt"):
        return "txt"
    return "json" if extension.endswith(".json") else None


def _add(path: Path, samples: Samples, name: str, payload: Payload) -> None:
    match = SAMPLE_NAME.fullmatch(name)
    if match is None:
        return
    roles = samples.setdefault(match[1], {})
    role = _role(name)
    if role in roles:
        raise CorpusError(
            f"{path}: sample {match[1]!r} has a second .{role} file, {name!r}; a key is the name up to its first "
            "dot and "
            "must be unique in the shard"
        )
    if role is not None:
        roles[role] = payload


def _check_end(path: Path, mapped: mmap.mmap, end: int) -> None:
    """A tar ends with a block of zeros and only zeros follow. tarfile takes a cut between two members for the end."""
    if end + TAR_BLOCK_BYTES > len(mapped):
        raise CorpusError(
            f"{path}: truncated: its {len(mapped)} bytes end without the end mark of a tar; copy or make the shard "
            "again"
        )
    if mapped[end : end + TAR_BLOCK_BYTES].strip(b"\0"):
        raise CorpusError(f"{path}: damaged header at byte {end}; copy or make the shard again")
    for start in range(end, len(mapped), 1 << 20):
        if mapped[start : start + (1 << 20)].strip(b"\0"):
            raise CorpusError(
                f"{path}: more data after the end mark at byte {end}; join tars with `tar --concatenate`, not `cat`"
            )


def _text_columns(samples: Samples) -> dict[str, NDArray[np.int64]]:
    absent: Payload = (-1, -1)
    rows = [(*roles.get("txt", absent), *roles.get("json", absent)) for roles in samples.values()]
    table = np.array(rows, np.int64).reshape(-1, len(TEXT_COLUMNS))
    return {name: table[:, column] for column, name in enumerate(TEXT_COLUMNS)}


def _token_columns(
    path: Path, mapped: mmap.mmap, samples: Samples
) -> tuple[dict[str, NDArray[np.int64]], int, int, IdType]:
    """The columns of all blocks, and the shard's number of tokens, largest id and type of ids."""
    rows, max_id, dtypes = [], 0, set()
    for key, roles in samples.items():
        missing = {"ids", "ends"} - set(roles)
        if missing:
            raise CorpusError(f"{path}: block {key!r} has no .{missing.pop()}.npy file; make the shard again")
        ids, ids_offset = _npy(path, mapped, key, roles["ids"], ("uint16", "uint32"))
        ends, ends_offset = _npy(path, mapped, key, roles["ends"], ("int64",))
        if (len(ends) and (ends[0] < 0 or np.any(np.diff(ends) < 0))) or (int(ends[-1]) if len(ends) else 0) != len(
            ids
        ):
            raise CorpusError(
                f"{path}: block {key!r}: its ends do not increase up to its {len(ids)} ids; make the shard again"
            )
        dtypes.add(ids.dtype.name)
        max_id = max(max_id, int(ids.max(initial=0)))
        rows.append((len(ends), len(ids), ids_offset, ends_offset))
    if len(dtypes) != 1:
        raise CorpusError(
            f"{path}: blocks of different types of ids ({', '.join(sorted(dtypes))}); make the shard again"
        )
    table = np.array(rows, np.int64).reshape(-1, len(TOKEN_COLUMNS))
    columns = {name: table[:, column] for column, name in enumerate(TOKEN_COLUMNS)}
    return columns, int(columns["block_tokens"].sum()), max_id, "uint16" if dtypes == {"uint16"} else "uint32"


def _npy(
    path: Path, mapped: mmap.mmap, key: str, payload: Payload, dtypes: tuple[str, ...]
) -> tuple[NDArray[np.integer], int]:
    """A one-dimensional .npy file inside the map: a view of it, and the byte offset in the tar of its first element."""
    offset, size = payload
    header = io.BytesIO(mapped[offset : offset + min(size, MAGIC_BYTES)])
    try:
        version = np.lib.format.read_magic(header)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(header)
    except ValueError as error:
        raise CorpusError(f"{path}: block {key!r}: not a .npy file ({error}); make the shard again") from error
    first = offset + header.tell()
    if len(shape) != 1 or dtype.name not in dtypes or dtype.byteorder == ">" or first % dtype.itemsize:
        raise CorpusError(
            f"{path}: block {key!r}: expected one aligned dimension of {' or '.join(dtypes)}, found {shape} of {dtype}"
        )
    if header.tell() + shape[0] * dtype.itemsize != size:
        raise CorpusError(f"{path}: block {key!r}: its header promises {shape[0]} elements, the file has {size} bytes")
    return np.frombuffer(mapped, dtype, shape[0], first), first
