"""Spans of time: as people read them, and as SLURM writes them. Everything is in seconds."""

import re

_SLURM = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def clock(seconds: float) -> str:
    """`0:01:20`, with days in front where there are any: `2 d 3:00:00`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    shown = f"{hour}:{minute:02d}:{second:02d}"
    return f"{days} d {shown}" if days else shown


def rounded(seconds: float) -> str:
    """The same in its largest unit alone: `12 s`, `3 min`, `5 h`, `8 d`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def parse_slurm_limit(text: str) -> int | None:
    """A time limit as sbatch takes it; None: without a limit.

    `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes`,
    `days-hours:minutes:seconds`; 0 means no limit.

    Raises:
        ValueError: it is none of these.
    """
    match = _SLURM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time limit of SLURM's; write [days-]hours:minutes:seconds")
    days, *rest = match.groups()
    first, second, third = (None if part is None else int(part) for part in rest)
    if days is not None:
        seconds = int(days) * 86_400 + (first or 0) * 3_600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        seconds = (first or 0) * 3_600 + (second or 0) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    return seconds or None


def parse_slurm_left(text: str) -> int | None:
    """The time left as squeue prints it, `[[days-]hours:]minutes:seconds`; None: no limit, or no number."""
    days, _, rest = text.strip().rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts) or not (days or "0").isdecimal():
        return None  # UNLIMITED, INVALID
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return seconds + int(days or 0) * 86_400
