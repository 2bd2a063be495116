"""`dstrain logs RUN`: what the ranks of an attempt printed, each line after its rank; or only what went wrong."""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.errors import EXIT_DONE, UserError
from dstrain.observe.run_record import RunRecord, check_run_folder, state_of_run
from dstrain.rundir.run_folder import attempt_folder, next_attempt

LOOK_EVERY_SECONDS = 0.3
_STATE_EVERY_SECONDS = 3.0
_RANK_LOG = re.compile(r"rank-(\d+)\.log")
_WRONG = re.compile(
    r"\b\w*(?:error|exception|warning|failure)\b|\b(?:failed|fatal|critical|aborted|killed|denied|corrupt\w*)\b"
    r"|segmentation fault|no space left|out of memory|not finite",
    re.IGNORECASE,
)
_STACK_BEGINS = re.compile(r"\(most recent call (?:first|last)\)")


class Errors:
    """Picks the lines of one log that say what went wrong: errors, warnings, and stacks as a whole."""

    def __init__(self) -> None:
        self._in_stack = self._is_traceback = False

    def wants(self, line: str) -> bool:
        """Whether to show the next line."""
        if _STACK_BEGINS.search(line):
            self._in_stack, self._is_traceback = True, "call last" in line
            return True
        if self._in_stack:
            if line[:1].isspace():
                return True
            self._in_stack = False
            if self._is_traceback and line:  # `ValueError: …`, whatever it is called
                return True
        return _WRONG.search(line) is not None


@dataclass
class Log:
    """A file that grows, read by whole lines."""

    file: Path
    label: str
    errors: Errors | None
    _offset: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def lines(self, *, to_the_end: bool) -> Iterator[str]:
        """What is new. `to_the_end`: also a last line that is not finished."""
        with self.file.open("rb") as stream:
            stream.seek(self._offset)
            for piece in stream:
                self._offset += len(piece)
                self._rest += piece
                if piece.endswith(b"\n"):
                    yield from self._take()
        if to_the_end and self._rest:
            yield from self._take()

    def _take(self) -> Iterator[str]:
        line, self._rest = self._rest.decode(errors="replace").rstrip("\r\n"), b""
        if self.errors is None or self.errors.wants(line):
            yield f"{self.label} | {line}"


def logs_command(args: Namespace) -> int:
    """`dstrain logs RUN [--rank K] [--attempt N] [--follow] [--errors]`.

    Raises:
        UserError: this is no run's folder, or it has no such attempt or rank.
    """
    run_dir = Path(args.run).expanduser()
    check_run_folder(run_dir)
    newest = next_attempt(run_dir) - 1
    attempt = newest if args.attempt is None else args.attempt
    if args.attempt is not None and not attempt_folder(run_dir, attempt).is_dir():
        raise UserError(f"{run_dir} has no attempt {attempt}; the newest one is {newest}")
    if not newest and not args.follow:
        raise UserError(f"{run_dir} has no attempt yet, and so no logs")
    if args.follow and args.attempt is None:
        _follow(run_dir, newest, args.rank, args.errors)
        return EXIT_DONE
    logs = find_logs(attempt_folder(run_dir, attempt), args.rank, args.errors)
    if not logs:
        which = "no logs" if args.rank is None else f"no log of rank {args.rank}"
        raise UserError(
            f"attempt {attempt} of {run_dir} has {which}; {attempt_folder(run_dir, attempt)} is where to look"
        )
    for log in logs.values():
        for line in log.lines(to_the_end=True):
            print(line)
    return EXIT_DONE


def find_logs(folder: Path, rank: int | None, errors: bool, known: dict[Path, Log] | None = None) -> dict[Path, Log]:
    """The logs of an attempt, those of `rank` or all (agents' too, in front); `known` ones stay as they are."""
    logs: dict[Path, Log] = {}
    for file in sorted((folder / "logs").glob("*/*.log"), key=lambda file: (file.name != "launcher.log", file.name)):
        match = _RANK_LOG.fullmatch(file.name)
        number = None if match is None else int(match[1])
        if rank is not None and number != rank:
            continue
        label = f"{file.parent.name} agent" if number is None else f"rank {number}"
        logs[file] = (known or {}).get(file) or Log(file, label, Errors() if errors else None)
    return logs


def _follow(run_dir: Path, attempt: int, rank: int | None, errors: bool) -> None:
    """Print what comes, over all further attempts, until the run has ended."""
    logs: dict[Path, Log] = {}
    asked, running = -_STATE_EVERY_SECONDS, True
    while True:
        newest = max(attempt, next_attempt(run_dir) - 1)
        over = newest > attempt or not running
        logs = find_logs(attempt_folder(run_dir, attempt), rank, errors, logs)
        for log in logs.values():
            for line in log.lines(to_the_end=over):
                print(line)
        sys.stdout.flush()
        if newest > attempt:
            attempt, logs = attempt + 1, {}
            print(f"--- attempt {attempt}", flush=True)
            continue
        if not running:
            return
        if time.monotonic() - asked > _STATE_EVERY_SECONDS:
            asked = time.monotonic()
            running = state_of_run(run_dir, RunRecord.read(run_dir), time.time()) not in ("ended", "lost")
            if not running:
                continue
        time.sleep(LOOK_EVERY_SECONDS)
