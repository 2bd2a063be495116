"""A control group of the drill's own, whose memory can be limited while processes live in it. Versions 1 and 2."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path("/sys/fs/cgroup")
_REMOVED_WITHIN_SECONDS = 10.0  # processes that have just been killed still count for a moment


@dataclass(frozen=True)
class MemoryGroup:
    """One group. `version` decides what its files are called."""

    folder: Path
    version: int

    @classmethod
    def create(cls) -> Self | None:
        """A new group below that of this process, or else below the root; None where neither is allowed."""
        for parent, version in _parents():
            group = cls(parent / f"dstrain-drill-{os.getpid()}", version)
            with contextlib.suppress(OSError):
                group.folder.mkdir()
                if group._limit_file.exists() and os.access(group.folder / "cgroup.procs", os.W_OK):
                    return group
                group.folder.rmdir()
        return None

    def used_bytes(self) -> int:
        """What its processes use, with what the kernel caches of files for them."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.folder / name).read_text())

    def limit(self, most_bytes: int | None) -> None:
        """Allow no more than this; None lifts the limit. Swapping does not help."""
        unlimited = "-1" if self.version == 1 else "max"
        self._limit_file.write_text(unlimited if most_bytes is None else str(most_bytes))
        with contextlib.suppress(OSError):  # without swap there may be no such file
            swap = "memory.swappiness" if self.version == 1 else "memory.swap.max"
            (self.folder / swap).write_text("0")

    def remove(self) -> None:
        """Once its processes have ended."""
        deadline = time.monotonic() + _REMOVED_WITHIN_SECONDS
        while self.folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            time.sleep(0.02)

    @property
    def _limit_file(self) -> Path:
        return self.folder / ("memory.limit_in_bytes" if self.version == 1 else "memory.max")


def _parents() -> list[tuple[Path, int]]:
    """Where a group might be made: beside its own version's files."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    if "memory" in own:
        return [(ROOT / "memory" / own["memory"], 1), (ROOT / "memory", 1)]
    return [(ROOT / own.get("", ""), 2), (ROOT, 2)]
