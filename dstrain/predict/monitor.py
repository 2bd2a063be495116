"""`dstrain monitor`: classify a stream of lines, and say when the negative ones surge.

    tail -f messages.log | dstrain monitor MODEL --negative neg
    dstrain monitor MODEL messages.jsonl --negative neg --replay     the `time` of each line is the clock

A line is a text, or an object with the text and, where it has them, `time` (seconds since 1970, or ISO 8601) and
`topic`. A line that cannot be used is counted and passed over: a monitor does not die of one.
"""

import json
import math
import queue
import re
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from dstrain.errors import EXIT_DONE, UserError
from dstrain.predict.command import STANDARD_INPUT, opened
from dstrain.predict.items import Item, read_items
from dstrain.predict.loaded import transformers_folder
from dstrain.predict.predictors import TextClassifier
from dstrain.predict.surges import Change, Message, Rule, changes

NEGATIVE = ("negative", "neg")  # what the label is called where nobody says which one it is
PROBLEMS_SHOWN = 5
TEXT_SHOWN = 120  # characters
TopicsOf = Callable[[str], tuple[str, ...]]


def monitor_command(args: Namespace) -> int:
    """`dstrain monitor MODEL [FILE|-] --negative LABEL [--topics FILE] [--replay] [--json] …`."""
    rule = _rule(args)
    topics_of = read_topics(Path(args.topics)) if args.topics else lambda _text: ()
    classifier = TextClassifier(transformers_folder(Path(args.model)))
    negative = negative_label(list(classifier.labels.values()), args.negative)
    if len(classifier.fields) > 1:
        raise UserError(f"{args.model} takes pairs of texts; a monitor reads one text a line")
    counts: Counter[str] = Counter()
    problems: list[str] = []

    def messages(items: Iterator[tuple[Item, float] | None]) -> Iterator[Message]:
        """Those of the lines that are at hand, classified in batches, so that a slow stream waits for nobody."""
        for batch in items_at_hand(items, args.batch_rows):
            usable: list[tuple[Item, float]] = []
            for item, arrived in batch:
                when = message_time(item, arrived, args.replay) if item.problem is None else item.problem
                if isinstance(when, str):
                    problems.extend([f"{item.place}: {when}"] if len(problems) < PROBLEMS_SHOWN else [])
                else:
                    usable.append((item, when))
            best = classifier.best([item.values for item, _ in usable], args.batch_rows) if usable else []
            negatives = sum(one.label == negative for one in best)
            counts.update(lines=len(batch), bad=len(batch) - len(usable), negative=negatives)  # Ctrl-C may come
            for (item, when), one in zip(usable, best, strict=True):
                text = item.values[0]
                yield Message(when, given_topics(item) + topics_of(text), one.label == negative, text)

    with ExitStack() as stack:
        stream = stack.enter_context(_stream(args.file))
        field = args.text_field or classifier.fields[0]
        try:
            for change in changes(messages(read_in_background(stream, args.file, field)), rule):
                counts["surges"] += change.begins
                print(as_json(change) if args.json else as_text(change, rule), flush=True)
        finally:  # Ctrl-C ends a monitor, too
            for problem in problems:
                print(f"passed over: {problem}", file=sys.stderr)
            shown = f"{counts['lines']:,} lines, {counts['bad']:,} of them bad; {counts['negative']:,} negative"
            print(f"{shown}; {counts['surges']:,} surges", file=sys.stderr)
    return EXIT_DONE


def _rule(args: Namespace) -> Rule:
    if not (args.window_minutes > 0 and args.baseline_minutes > 0):
        raise UserError("--window-minutes and --baseline-minutes are spans of time; give more than 0")
    if args.baseline_minutes < args.window_minutes:
        raise UserError(
            f"--baseline-minutes {args.baseline_minutes:g} is less than --window-minutes {args.window_minutes:g}; what "
            f"is usual shows in a longer time"
        )
    if not 0 < args.begin < args.end < 1:
        raise UserError(f"--begin {args.begin:g} and --end {args.end:g}: give probabilities, the first the smaller")
    if args.least < 1 or args.batch_rows < 1:
        raise UserError("--least and --batch-rows are numbers of messages; give 1 or more")
    return Rule(args.window_minutes * 60, args.baseline_minutes * 60, args.least, args.begin, args.end)


def negative_label(labels: list[str], given: str | None) -> str:
    """Which label is the negative one. Raises UserError where that is not to be told."""
    if given in labels:
        return given
    found = [label for label in labels if given is None and label.lower() in NEGATIVE]
    if len(found) == 1:
        return found[0]
    asked = f"--negative {given} is no label of the model" if given else "which label is the negative one is not known"
    raise UserError(f"{asked}; give --negative with one of: {', '.join(labels[:20])}")


# ---------------------------------------------------------------- topics and times


def read_topics(path: Path) -> TopicsOf:
    """What finds the topics of a text: a line each, `delivery: late, courier, 快递`; words are words, in any case.

    Raises:
        UserError: the file cannot be read, or a line of it is no topic.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    patterns: dict[str, re.Pattern[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, listed = line.partition(":")
        words = [word.strip() for word in listed.split(",") if word.strip()]
        if not colon or not name.strip() or not words:
            raise UserError(f"{path}:{number}: no topic with its words; write it as in `delivery: late, courier`")
        # A word of Latin letters ends where letters end; Chinese has no such ends.
        bounded = [rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word) for word in words]
        patterns[name.strip()] = re.compile("|".join(bounded), re.IGNORECASE)
    if not patterns:
        raise UserError(f"{path}: names no topic; write one a line, as in `delivery: late, courier`")
    return lambda text: tuple(name for name, pattern in patterns.items() if pattern.search(text))


def given_topics(item: Item) -> tuple[str, ...]:
    """The topics that a line names itself, as `topic`: one or a list."""
    value = item.given.get("topic")
    return tuple(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one)


def message_time(item: Item, arrived: float, replay: bool) -> float | str:
    """When a message was, in seconds since 1970: when it arrived, or in a replay as it says; or what is wrong there."""
    if not replay:
        return arrived
    value = item.given.get("time")
    try:
        if isinstance(value, str) and not re.fullmatch(r"[\d.]+", value):
            found = datetime.fromisoformat(value)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        seconds = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if math.isfinite(seconds):
        return seconds
    return (
        f"time is {json.dumps(value)[:40]}; a replay needs seconds since 1970 or ISO 8601, as in 2026-11-26T10:00:00Z"
    )


# ---------------------------------------------------------------- lines as they come


def read_in_background(stream: BinaryIO, name: str, field: str) -> Iterator[tuple[Item, float] | None]:
    """The items of a stream with the time at which each arrived; None where the next one is not there yet.

    A thread reads, for reading a pipe waits, and what has arrived should not wait for what has not.
    """
    arrived: queue.Queue[tuple[Item, float] | BaseException | None] = queue.Queue(maxsize=1024)

    def read() -> None:
        try:
            for item in read_items(stream, "standard input" if name == STANDARD_INPUT else name, [field]):
                arrived.put((item, time.time()))
            arrived.put(None)
        except BaseException as error:  # of the user's, mostly; it belongs to who reads
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            got = arrived.get_nowait()
        except queue.Empty:
            yield None
            got = arrived.get()
        if got is None:
            return
        if isinstance(got, BaseException):
            raise got
        yield got


def _stream(file: str) -> AbstractContextManager[BinaryIO]:
    """A file, or standard input by a reader of its own: Python cannot exit while a thread waits in `sys.stdin`."""
    if file == STANDARD_INPUT:
        return nullcontext(open(sys.stdin.fileno(), "rb", closefd=False))
    return opened(file)


def items_at_hand(items: Iterator[tuple[Item, float] | None], batch_rows: int) -> Iterator[list[tuple[Item, float]]]:
    """Batches of at most `batch_rows` items; a batch ends early where the next item is not there yet."""
    batch: list[tuple[Item, float]] = []
    for one in chain(items, [None]):
        if one is not None:
            batch.append(one)
        if batch and (one is None or len(batch) == batch_rows):
            yield batch
            batch = []


# ---------------------------------------------------------------- what is said


def as_json(change: Change) -> str:
    """One line of JSON."""
    found: dict[str, Any] = asdict(change) | {"time": _clock(change.time), "texts": list(change.texts)}
    return json.dumps(found, ensure_ascii=False)


def as_text(change: Change, rule: Rule) -> str:
    """A line for people, and the newest negative texts below it where a surge begins."""
    minutes = f"{rule.window_seconds / 60:g} minutes"
    line = (
        f"{_clock(change.time)} {'ALERT' if change.begins else 'over '} {change.topic}: "
        f"{_share(change.negatives, change.messages)} negative in {minutes}, "
        f"{_share(change.negatives_before, change.messages_before)} before, p = {change.p:.1g}"
    )
    texts = [f"    {text[:TEXT_SHOWN]}" for text in change.texts] if change.begins else []
    return "\n".join([line, *texts])


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.0%})" if whole else "0 of 0"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
