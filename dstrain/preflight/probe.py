"""What is so on one node, told in facts; what to think of them is decided elsewhere (see dstrain.preflight.checks).

    python -m dstrain.preflight.probe QUESTIONS NODE    prints its facts in JSON, in short lines with the node's number

It imports the standard library only, since it runs before every launch. Where it is asked for the long form it reads
corpora and measures the disk as well.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from dstrain.base.code_digest import code_digest
from dstrain.base.environment import interface_names, visible_devices
from dstrain.errors import EXIT_DONE, CorpusError

MARK = "dstrain-probe"  # login shells print things of their own
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "numpy", "safetensors", "tokenizers")
_LIMITS = {"open files": "NOFILE", "processes": "NPROC", "locked memory": "MEMLOCK"}
_LINE_CHARACTERS = 400
_WRITTEN_BYTES = 32 << 20
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>


@dataclass(frozen=True)
class Questions:
    """What a node is asked. Paths are absolute, or start in the folder that the probe works in."""

    run_dir: str
    token: str  # a file in it, which every node has to see
    paths: tuple[str, ...] = ()
    corpora: tuple[tuple[str, str], ...] = ()  # location, and the key of the text
    first_host: str | None = None  # that all nodes have to find; None for a single node
    port: int | None = None  # on which node 0 is to listen
    is_long: bool = False

    def as_word(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_word(cls, word: str) -> Self:
        """Back from it."""
        content = json.loads(word)
        return cls(**content | {"paths": tuple(content["paths"]), "corpora": tuple(map(tuple, content["corpora"]))})


@dataclass(frozen=True)
class Facts:
    """One node. Bytes are bytes, None is unlimited, unknown, or not asked for."""

    host: str
    code: str  # digest of the package
    versions: dict[str, str | None]
    time_unix: float
    missing: list[str]  # of the paths; also empty folders, where a disk is not mounted, and what may not be read
    token: str | None  # what the file holds here
    unwritable: str | None  # why nothing can be written into the run's folder
    file_system: str
    free_bytes: int
    free_files: int | None
    shm_free_bytes: int | None
    limits: dict[str, int | None]
    cores: int
    devices: list[str]
    visible_devices: int
    has_infiniband: bool
    interfaces: dict[str, str | None]  # with their IPv4 address
    own_addresses: list[str]  # what the host's own name leads to
    first_addresses: list[str]  # what the first host's name leads to
    busy_port: str | None  # why node 0 cannot listen
    environment: dict[str, str]  # what libraries read of it
    corpora: dict[str, str] = field(default_factory=dict)  # location → digest, or what is wrong
    bytes_per_second: float | None = None  # written into the run's folder


def facts(questions: Questions, node: int = 0) -> Facts:
    """What is so on this machine."""
    folder = Path(questions.run_dir)
    token = None
    with contextlib.suppress(OSError):
        token = Path(questions.token).read_text()
    unwritable, bytes_per_second = _written(folder, node, _WRITTEN_BYTES if questions.is_long else 1)
    space = os.statvfs(_existing(folder))
    devices, visible = _devices()
    return Facts(
        host=socket.gethostname(),
        code=code_digest(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        time_unix=time.time(),
        missing=[path for path in questions.paths if not _is_there(Path(path))],
        token=token,
        unwritable=unwritable,
        file_system=_file_system(_existing(folder)),
        free_bytes=space.f_bavail * space.f_frsize,
        free_files=space.f_favail if space.f_files else None,
        shm_free_bytes=_free("/dev/shm"),
        limits={name: _limit(getattr(resource, f"RLIMIT_{kind}")) for name, kind in _LIMITS.items()},
        cores=len(os.sched_getaffinity(0)),
        devices=devices,
        visible_devices=visible,
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        interfaces={name: _address(name) for _, name in socket.if_nameindex()},
        own_addresses=_addresses(socket.gethostname()),
        first_addresses=[] if questions.first_host is None else _addresses(questions.first_host),
        busy_port=_busy(questions.port) if questions.port is not None and node == 0 else None,
        environment=interface_names(),
        corpora={location: _corpus(location, key) for location, key in questions.corpora} if questions.is_long else {},
        bytes_per_second=bytes_per_second if questions.is_long else None,
    )


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


# ---------------------------------------------------------------- disks


def _written(folder: Path, node: int, size: int) -> tuple[str | None, float]:
    """Why a file cannot be written into the folder, or bytes per second."""
    file, started = folder / f".probe-{socket.gethostname()}-{node}-{os.getpid()}", time.perf_counter()
    try:
        with file.open("wb") as output:
            output.write(bytes(size))
            output.flush()
            os.fsync(output.fileno())
    except OSError as error:
        return error.strerror or str(error), 0.0
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    return None, size / (time.perf_counter() - started)


def _is_there(path: Path) -> bool:
    try:
        return any(path.iterdir()) if path.is_dir() else os.access(path, os.R_OK)
    except OSError:  # a folder above it may not be looked into
        return False


def _existing(folder: Path) -> Path:
    """The folder, or what there is of its path."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _file_system(folder: Path) -> str:
    """Its type, by the longest mount point that holds the folder."""
    found, longest = "unknown", -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split(" ")
            place = place.replace("\\040", " ")
            if folder.resolve().is_relative_to(place) and len(place) >= longest:
                found, longest = kind, len(place)
    return found


def _free(path: str) -> int | None:
    with contextlib.suppress(OSError):
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize
    return None


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _corpus(location: str, text_field: str) -> str:
    """The digest of a corpus's index, once all of its shards are there in full; or what is wrong."""
    from dstrain.data.shards import Corpus

    try:
        corpus = Corpus.open(location, text_field=text_field)
        corpus.check_sizes()
        return corpus.digest
    except (CorpusError, OSError) as error:
        return f"error: {error}"


# ---------------------------------------------------------------- devices and network


def _devices() -> tuple[list[str], int]:
    """NVIDIA's devices by model, and how many processes here may use. The driver is not asked: that takes seconds."""
    models = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            lines = (line.partition(":") for line in file.read_text().splitlines())
            models += [value.strip() for key, _, value in lines if key == "Model"]
    if (_version("torch") or "").endswith("+cpu"):  # which sees none
        return models, 0
    present = [entry for entry in Path("/dev").glob("nvidia*") if entry.name.removeprefix("nvidia").isdigit()]
    visible = visible_devices()
    return models, len(visible) if visible is not None and present else len(present)


def _addresses(host: str) -> list[str]:
    with contextlib.suppress(OSError):
        return list(
            dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        )
    return []


def _address(interface: str) -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(asking, _SIOCGIFADDR, request)[20:24])
    return None


def _busy(port: int) -> str | None:
    """Why nobody can listen on a port here; None if one can."""
    with contextlib.suppress(OSError), socket.create_server(("", port)):
        return None
    return f"port {port} is in use"


def main(arguments: Sequence[str]) -> None:
    """The program of the module's docstring."""
    node = int(arguments[1])
    print("\n".join(said(facts(Questions.of_word(arguments[0]), node), node)), flush=True)
    os._exit(EXIT_DONE)


def said(found: Facts, node: int) -> Iterator[str]:
    """The lines of a node. Short ones: srun breaks long ones, and mixes the pieces with those of other nodes."""
    content = json.dumps(asdict(found))
    for start in range(0, len(content), _LINE_CHARACTERS):
        yield f"{MARK} {node} {content[start : start + _LINE_CHARACTERS]}|"


def heard(output: str) -> dict[int, Facts]:
    """Node → facts, from all lines that came back; those of one node are in their order."""
    parts: dict[int, str] = {}
    for line in output.splitlines():
        if f"{MARK} " in line:  # srun puts the node's number before it
            node, _, part = line.partition(f"{MARK} ")[2].partition(" ")
            parts[int(node)] = parts.get(int(node), "") + part.rstrip()[:-1]
    return {node: Facts(**json.loads(content)) for node, content in parts.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
