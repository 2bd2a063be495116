"""Where a process stands: its Python stacks, read from outside by py-spy, or from what faulthandler wrote into its log.

py-spy needs no help of the process, so it also sees one that is stopped or hangs in native code. It is not asked to
pause the process: one that stands still does not move under its eyes.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.processes import run
from dstrain.diagnose.evidence import log_end

_INNERMOST, _OWN = 6, 2  # frames for a verdict: the innermost ones, and the innermost ones of this package
_TIMEOUT_SECONDS = 20.0
_TAIL_BYTES = 65_536
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)')


@dataclass(frozen=True)
class Thread:
    """A thread's frames, the innermost first, each as `name (file.py:12)`."""

    name: str
    frames: tuple[str, ...]


def spied(pid: int) -> list[Thread]:
    """All threads of a process, the main one in front; [] where py-spy is missing, or may not look."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return []
    words = [program, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        answer = run(words, timeout_seconds=_TIMEOUT_SECONDS)
        found: list[dict[str, Any]] = json.loads(answer.output) if answer.exit_code == 0 else []
    except (OSError, ValueError):
        return []
    threads = [Thread(thread["thread_name"] or "?", _frames(thread)) for thread in found]
    return sorted(threads, key=lambda thread: thread.name != "MainThread")


def children(pid: int) -> list[int]:
    """The processes that a process has started and that live."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(word) for file in files for word in file.read_text().split())


def as_text(pid: int, threads: list[Thread]) -> str:
    """All of a process, for a file."""
    blocks = (f"{thread.name}\n" + "".join(f"    {frame}\n" for frame in thread.frames) for thread in threads)
    return f"process {pid}\n" + "".join(blocks)


def in_log(log: Path) -> tuple[str, ...]:
    """Where the process stood by the last stack that faulthandler wrote into a log; () if there is none."""
    _, marker, stack = log_end(log, _TAIL_BYTES).rpartition("Current thread ")
    frames = []
    for line in stack.splitlines()[1:] if marker else ():
        if not (match := _FRAME.match(line)):
            break
        frames.append(f"{match['name']} ({_short(match['file'])}:{match['line']})")
    return shortened(frames)


def shortened(frames: Sequence[str]) -> tuple[str, ...]:
    """Where a thread stands, in a few frames, and from where in this package it has come there."""
    inner, outer = tuple(frames[:_INNERMOST]), frames[_INNERMOST:]
    own = [frame for frame in outer if "(dstrain/" in frame][:_OWN]
    return inner if not own or any("(dstrain/" in frame for frame in inner) else (*inner, "…", *own)


def _frames(thread: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{frame['name']} ({_short(frame['filename'])}:{frame['line']})" for frame in thread["frames"])


def _short(file: str) -> str:
    """`torch/nn/module.py`: what is below site-packages, or the last three parts."""
    return "/".join(file.rpartition("site-packages/")[2].split("/")[-3:]).lstrip("/")
