"""How random the order of documents is, beside a full random shuffle of the same documents, and what that costs.

    python tools/bench/shuffle.py                    # spread, autocorrelation, two epochs, hostile lengths
    python tools/bench/shuffle.py --windows 1 4 64   # the same for other windows than the default one
    python tools/bench/shuffle.py --cost             # what a larger window costs: first row, memory, tokens/s

The orders are those of the project's own modules (`line.py`, `lanes.py`), asked for every slice of every document of
an epoch; only the documents are not on a disk. The random shuffle draws one order of all documents, and lays them end
to end. It is measured twice: cut into batches (`end to end`), and dealt to lanes which are read side by side as this
project's are (`in lanes`): a lane reads a document that is longer than a row in several batches, which makes batches
alike whatever the order is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpora import median_of, table, write_linked_corpus
from numpy.typing import NDArray
from specs import stream_spec

from dstrain.data.lanes import SourceLanes
from dstrain.data.line import default_window_blocks
from dstrain.data.shards import Slices
from dstrain.data.stream import RowStream
from dstrain.recipe.schema import default_lanes

Int64Array = NDArray[np.int64]
RANDOM_ORDERS = 4  # drawn of each corpus
ROWS_OF_A_LANE = 4  # in a batch, beside what is the default
COST_LANES, COST_SHARD_DOCUMENTS = 64, 2000


@dataclass(frozen=True)
class Contents:
    """A corpus that is only lengths: document i is of a kind, and each kind lies in one piece, as in a shard."""

    name: str
    lengths: Int64Array
    kinds: Int64Array  # of each document

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


class ContentsAsCorpus:
    """What `SourceLanes` asks of a corpus. A slice's `shard` is the document's number, `start` a place on the line."""

    def __init__(self, contents: Contents) -> None:
        self.ends = np.cumsum(contents.lengths)
        self.starts = self.ends - contents.lengths
        self.total_tokens, self.total_documents = contents.tokens, len(contents.lengths)
        self.digest = contents.name

    def slices(self, first: int, last: int) -> Slices:
        numbers = np.arange(
            np.searchsorted(self.ends, first, "right"), np.searchsorted(self.ends, last - 1, "right") + 1
        )
        starts = np.maximum(self.starts[numbers], first)
        return Slices(numbers, starts, np.minimum(self.ends[numbers], last) - starts)


@dataclass(frozen=True)
class Reading:
    """What one lane reads, in order: `length` tokens of `document` from `start` of the line on, at `position`."""

    document: Int64Array
    start: Int64Array
    length: Int64Array
    position: Int64Array  # of the lane's life


@dataclass(frozen=True)
class Case:
    """A corpus and how it is trained on."""

    contents: Contents
    rows: int
    row_tokens: int
    lanes: int

    @property
    def steps(self) -> int:
        """Whole batches of an epoch."""
        return self.contents.tokens // (self.rows * self.row_tokens)


def many_kinds(documents_of_a_kind: int, kinds: int, mean: int, seed: int = 0) -> Contents:
    """Log-normal lengths, each kind in a shard of its own."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(0.6 * mean), 1.0, documents_of_a_kind * kinds), 4, 30 * mean)
    return Contents(
        f"{kinds} kinds, {documents_of_a_kind * kinds:,} documents",
        lengths.astype(np.int64),
        np.repeat(np.arange(kinds), documents_of_a_kind),
    )


def hostile() -> Contents:
    """A few very long documents before many very short ones."""
    lengths = np.repeat(np.array([40_000, 20]), [40, 40_000])
    return Contents("hostile lengths", lengths, (lengths < 40_000).astype(np.int64))


# ---------------------------------------------------------------- orders


def our_readings(case: Case, lanes: SourceLanes, epoch: int) -> Iterator[Reading]:
    """What each lane reads in an epoch."""
    for lane in range(case.lanes):
        position, last = lanes.line.epoch_start(lane, epoch), lanes.line.epoch_start(lane, epoch + 1)
        parts = []
        while position < last:
            window = lanes.line.window_at(lane, position)
            slices, _ = lanes.window_slices(window)
            parts.append(slices)
            position += window.tokens
        document, start, length = (np.concatenate([getattr(part, name) for part in parts]) for name in SLICE_COLUMNS)
        ends = np.cumsum(length)
        yield Reading(document, start, length, ends - length + lanes.line.epoch_start(lane, epoch))


SLICE_COLUMNS = ("shard", "start", "length")


def random_readings(case: Case, lanes: int, rng: np.random.Generator) -> Iterator[Reading]:
    """A random order of whole documents, cut into equal ranges for `lanes` lanes."""
    order = rng.permutation(len(case.contents.lengths))
    lengths = case.contents.lengths[order]
    ends = np.cumsum(lengths)
    starts_on_line = (np.cumsum(case.contents.lengths) - case.contents.lengths)[order]
    for lane in range(lanes):
        first, last = case.contents.tokens * lane // lanes, case.contents.tokens * (lane + 1) // lanes
        inside = slice(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last - 1, "right") + 1)
        skipped = np.maximum(first - (ends[inside] - lengths[inside]), 0)
        length = np.minimum(ends[inside], last) - (ends[inside] - lengths[inside]) - skipped
        yield Reading(order[inside], starts_on_line[inside] + skipped, length, np.cumsum(length) - length)


# ---------------------------------------------------------------- measures


def kind_shares(case: Case, readings: Iterator[Reading], lanes: int) -> NDArray[np.float64]:
    """(steps, kinds): the share of each kind in the tokens of each batch."""
    lane_tokens = case.rows * case.row_tokens // lanes  # in a step
    kinds = int(case.contents.kinds.max()) + 1
    tokens = np.zeros(case.steps * kinds)
    for reading in readings:
        first_step = reading.position // lane_tokens
        spanned = (reading.position + reading.length - 1) // lane_tokens - first_step
        for offset in range(int(spanned.max(initial=-1)) + 1):
            step = first_step + offset
            some = (spanned >= offset) & (step < case.steps)
            low = np.maximum(reading.position[some], step[some] * lane_tokens)
            high = np.minimum(reading.position[some] + reading.length[some], (step[some] + 1) * lane_tokens)
            place = step[some] * kinds + case.contents.kinds[reading.document[some]]
            tokens += np.bincount(place, high - low, len(tokens))
    return tokens.reshape(case.steps, kinds) / (case.rows * case.row_tokens)


def spread(shares: NDArray[np.float64]) -> float:
    """The standard deviation of a kind's share over batches, in the mean of the kinds."""
    return float(shares.std(axis=0).mean())


def autocorrelation(shares: NDArray[np.float64], lag: int = 1) -> float:
    """Of a kind's share in one batch with that in the next, in the mean of the kinds."""
    deviations = shares - shares.mean(axis=0)
    return float(((deviations[lag:] * deviations[:-lag]).mean(axis=0) / (deviations**2).mean(axis=0)).mean())


def places(case: Case, lanes: SourceLanes, epoch: int) -> NDArray[np.float64]:
    """When in an epoch each document begins to be read."""
    starts = np.cumsum(case.contents.lengths) - case.contents.lengths
    when = np.zeros(len(starts))
    for lane, reading in enumerate(our_readings(case, lanes, epoch)):
        begins = reading.start == starts[reading.document]
        when[reading.document[begins]] = reading.position[begins] - lanes.line.epoch_start(lane, epoch)
    return when


def times_seen(case: Case, lanes: SourceLanes) -> Int64Array:
    """How often each token was trained on after as many whole batches as an epoch has tokens for."""
    lane_last = case.steps * (case.rows * case.row_tokens // case.lanes)
    changes = np.zeros(case.contents.tokens + 1, np.int64)
    for epoch in (0, 1):
        for reading in our_readings(case, lanes, epoch):
            stop = reading.start + np.clip(lane_last - reading.position, 0, reading.length)
            np.add.at(changes, reading.start, 1)
            np.add.at(changes, stop, -1)
    return np.cumsum(changes[:-1])


# ---------------------------------------------------------------- tables


def open_lanes(case: Case, window_blocks: int | None) -> SourceLanes:
    """The lanes of a case's documents."""
    spec = stream_spec(
        (Path(case.contents.name),),
        rows=case.rows,
        row_tokens=case.row_tokens,
        lanes=case.lanes,
        shuffle_window=window_blocks,
    )
    return SourceLanes(ContentsAsCorpus(case.contents), spec)  # type: ignore[arg-type]


def order_line(case: Case, window_blocks: int | None) -> dict[str, Any]:
    """Spread, autocorrelation and the likeness of two epochs."""
    lanes = open_lanes(case, window_blocks)
    ours = kind_shares(case, our_readings(case, lanes, 0), case.lanes)
    rng = np.random.default_rng(0)
    in_lanes = [kind_shares(case, random_readings(case, case.lanes, rng), case.lanes) for _ in range(RANDOM_ORDERS)]
    end_to_end = [kind_shares(case, random_readings(case, 1, rng), 1) for _ in range(RANDOM_ORDERS)]
    first, second = places(case, lanes, 0), places(case, lanes, 1)
    has_kinds = ours.shape[1] > 1
    return {
        "corpus": case.contents.name,
        "batch": f"{case.rows} × {case.row_tokens}",
        "lanes": f"{case.lanes}{' (default)' if case.lanes == default_lanes([case.rows]) else ''}",
        "steps": case.steps,
        "block tokens": lanes.line.block_tokens,
        "window blocks": f"{lanes.line.window_blocks}{'' if window_blocks else ' (default)'}",
        "spread ÷ random in lanes": ratio(spread(ours), map(spread, in_lanes)) if has_kinds else "-",
        "÷ end to end": ratio(spread(ours), map(spread, end_to_end)) if has_kinds else "-",
        "lag-1": round(autocorrelation(ours), 2) if has_kinds else "-",
        "random in lanes": round(statistics.mean(map(autocorrelation, in_lanes)), 2) if has_kinds else "-",
        "two epochs": round(float(np.corrcoef(first, second)[0, 1]), 3),
        "documents cut": f"{lanes.line.blocks / lanes.corpus.total_documents:.2%}",
    }


def ratio(value: float, references: Iterator[float]) -> float:
    return round(value / statistics.mean(references), 2)


def seen_line(case: Case, window_blocks: int | None) -> dict[str, Any]:
    """What an epoch's tokens are, for documents of very different lengths."""
    seen = times_seen(case, open_lanes(case, window_blocks))
    is_long = np.repeat(case.contents.kinds == 0, case.contents.lengths)
    counts = np.bincount(seen, minlength=3) / len(seen)
    return {
        "corpus": case.contents.name,
        "lanes": case.lanes,
        "tokens in long documents": f"{is_long.mean():.2%}",
        "of those trained on": f"{seen[is_long].sum() / seen.sum():.2%}",
        "seen 0 times": f"{counts[0]:.2%}",
        "once": f"{counts[1]:.2%}",
        "twice or more": f"{counts[2:].sum():.2%}",
    }


def order_cases(quick: bool) -> list[Case]:
    """Corpora of many kinds under small and large batches, and one shard of one kind."""
    if quick:
        contents = many_kinds(100, 10, 300)
        return [Case(contents, 32, 128, 32)]
    rng = np.random.default_rng(0)
    uniform = Contents("58 kinds, 40,600 documents", rng.integers(50, 1000, 58 * 700), np.repeat(np.arange(58), 700))
    large = many_kinds(20_000, 40, 300)
    single = many_kinds(20_000, 1, 300)
    shapes = ((uniform, 256, 256), (uniform, 64, 512), (large, 256, 512), (large, 2048, 512), (large, 4096, 512))
    return [
        *(
            Case(contents, rows, row_tokens, lanes)
            for contents, rows, row_tokens in shapes
            for lanes in sorted({rows // ROWS_OF_A_LANE, default_lanes([rows])})
        ),
        *(Case(single, rows, 128, default_lanes([rows])) for rows in (16, 64)),
    ]


# ---------------------------------------------------------------- what a window costs


def cost_lines(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """For each window a process of its own, which reads a token corpus from the disk."""
    write_linked_corpus(folder / "corpus", folder / "originals", args.shards, COST_SHARD_DOCUMENTS)
    lines: dict[int | None, list[dict[str, float]]] = {window: [] for window in (None, *args.windows)}
    for _ in range(args.rounds):
        for window, measured in lines.items():
            settings = {"corpus": str(folder / "corpus"), "window": window, "seconds": args.seconds}
            command = [sys.executable, __file__, "--measure", json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            measured.append(json.loads(done.stdout))
    return [
        {
            "window blocks": window or f"{default_window_blocks(COST_LANES)} (default)",
            "lanes": COST_LANES,
            "first row, s": round(median_of(measured, "first_row_seconds"), 3),
            "memory, MB": round(median_of(measured, "megabytes"), 1),
            "M tokens/s": round(median_of(measured, "tokens_per_second") / 1e6, 1),
            "÷ default": round(
                statistics.median(
                    line["tokens_per_second"] / reference["tokens_per_second"]
                    for line, reference in zip(measured, lines[None], strict=True)
                ),
                2,
            ),
        }
        for window, measured in lines.items()
    ]


def measure_cost(settings: dict[str, Any]) -> dict[str, float]:
    """One window in this process: the first row, what memory grew by until all lanes had rows, and the speed."""
    rows, row_tokens, window = 4 * COST_LANES, 512, settings["window"]
    corpus = Path(settings["corpus"])
    spec = stream_spec((corpus,), rows=rows, row_tokens=row_tokens, lanes=COST_LANES, shuffle_window=window)
    started = time.perf_counter()
    with RowStream(spec, 0, 1) as stream:
        before = private_bytes()
        next(stream)
        first_row_seconds = time.perf_counter() - started
        grown = private_bytes() - before
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < settings["seconds"]:
            next(stream)
            steps += 1
        seconds = time.perf_counter() - started
    return {
        "first_row_seconds": first_row_seconds,
        "megabytes": grown / 1e6,
        "tokens_per_second": steps * rows * row_tokens / seconds,
    }


def private_bytes() -> int:
    """Memory of this process that is not a file's: mapped shards do not count."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", nargs="+", type=int, default=[], metavar="BLOCKS", help="besides the default")
    parser.add_argument("--cost", action="store_true", help="measure what windows cost instead")
    parser.add_argument("--shards", type=int, default=2000, help="of 2,000 documents each, for --cost")
    parser.add_argument("--rounds", type=int, default=3, help="for --cost (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of one measurement for --cost")
    parser.add_argument("--quick", action="store_true", help="small corpora: does it run?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_cost(json.loads(args.measure))))
        return
    if args.quick:
        args.shards, args.rounds, args.seconds = 2, 1, 0.2
    tables: list[list[dict[str, Any]]]
    if args.cost:
        with tempfile.TemporaryDirectory(prefix="dstrain-bench-") as folder:
            tables = [cost_lines(args, Path(folder))]
    else:
        windows = (None, *args.windows)
        tables = [[order_line(case, window) for case in order_cases(args.quick) for window in windows]]
        lanes = (64,) if args.quick else (16, 64, 256, 1024)
        tables.append([seen_line(Case(hostile(), count, 128, count), None) for count in lanes])
    if args.json:
        print(json.dumps(tables))
    else:
        print("\n\n".join(map(table, tables)))


if __name__ == "__main__":
    main()
