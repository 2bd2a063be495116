"""Host files in DeepSpeed's format: one `host slots=n` a line, `#` begins a comment. Filters are lists of hosts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.errors import UserError
from dstrain.recipe.messages import nearest

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
# What ssh takes for a destination and not for an option: user@name, a DNS name, an address.
_HOST = re.compile(r"([A-Za-z_][\w.-]*@)?[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks it has room for."""

    name: str
    slots: int | None  # None: it does not say


def read_hostfile(path: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[Host, ...]:
    """The hosts of a file in its order, after the filters.

    Raises:
        UserError: one line for each mistake, with file:line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}; hostfiles/ has examples") from None
    return select(parse_hostfile(text, str(path)), include, exclude, str(path))


def parse_hostfile(text: str, name: str) -> tuple[Host, ...]:
    """The hosts of a host file's text; `name` stands in messages.

    Raises:
        UserError: one line for each mistake, with file:line.
    """
    hosts: dict[str, tuple[Host, int]] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None or int(match[2]) < 1:
            problems.append(f"{name}:{number}: {content!r} is not `host slots=n` with n of at least 1")
        elif not _HOST.fullmatch(match[1]):
            problems.append(f"{name}:{number}: {match[1]!r} is not a host's name; write it as ssh takes it")
        elif match[1] in hosts:
            first = hosts[match[1]][1]
            problems.append(f"{name}:{number}: {match[1]} is already on line {first}; delete one of the two")
        else:
            hosts[match[1]] = (Host(match[1], int(match[2])), number)
    if not hosts and not problems:
        problems.append(f"{name}: there is no host in it; write lines such as `node1 slots=8`")
    if problems:
        raise UserError("\n".join(problems))
    return tuple(host for host, _ in hosts.values())


def select(
    hosts: Sequence[Host], include: Sequence[str], exclude: Sequence[str], name: str = "the host file"
) -> tuple[Host, ...]:
    """Keep the hosts of `include` (all, if it is empty) that are not in `exclude`.

    Raises:
        UserError: a filter names a host that is not there, or nothing is left.
    """
    known = [host.name for host in hosts]
    problems = []
    for key, names in (("hosts.include", include), ("hosts.exclude", exclude)):
        for wanted in names:
            if wanted not in known:
                close = nearest(wanted, known)
                remedy = f"did you mean {close}?" if close else f"it has {', '.join(known)}"
                problems.append(f"{key} has {wanted}, which is not in {name}; {remedy}")
    if problems:
        raise UserError("\n".join(problems))
    kept = tuple(host for host in hosts if (not include or host.name in include) and host.name not in exclude)
    if not kept:
        raise UserError(f"hosts.include and hosts.exclude leave no host of {name}; relax one of them")
    return kept
