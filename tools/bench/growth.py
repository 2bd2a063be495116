"""How opening a corpus grows with its shards: a million of them, one rank of 4,096, the first row.

    python tools/bench/growth.py                             # a million shards; takes minutes to make, and 2 GB of disk
    python tools/bench/growth.py --shards 10000 100000 --ranks 64

The shards are hard links to some tens of small ones, each with its index beside it. What is measured is one process
each: the seconds from opening the stream to the first row of the first rank, at step 0 and at step 10⁹, in process and
with the background process, and the peak memory of the process that reads the corpus.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from corpora import median_of, table, write_linked_corpus
from specs import stream_spec

from dstrain.data.stream import RowStream

FAR_STEP = 10**9
SHARD_DOCUMENTS = 32
ROW_TOKENS = 512


def growth_lines(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A line for each number of shards and each step."""
    lines = []
    for shards in args.shards:
        corpus = folder / "corpus"
        started = time.perf_counter()
        tokens = write_linked_corpus(corpus, folder / "originals", shards, SHARD_DOCUMENTS)
        print(f"{shards:,} shards linked in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        measured: dict[tuple[int, int], list[dict[str, float]]] = {
            (step, prefetch): [] for prefetch in (0, 4) for step in (0, FAR_STEP)
        }
        for _ in range(args.rounds):
            for (step, prefetch), results in measured.items():
                results.append(
                    measure({"corpus": str(corpus), "ranks": args.ranks, "step": step, "prefetch": prefetch})
                )
        for (step, prefetch), results in measured.items():
            lines.append(
                {
                    "shards": f"{shards:,}",
                    "tokens": f"{tokens:,}",
                    "ranks": args.ranks,
                    "step": f"{step:,}",
                    "background": prefetch > 0,
                    "first row, s": round(median_of(results, "first_row_seconds"), 2),
                    "of CPU": "-" if prefetch else round(median_of(results, "cpu_seconds"), 2),
                    "peak memory, MB": round(median_of(results, "peak_megabytes")),
                    "of it imports": round(median_of(results, "import_megabytes")),
                }
            )
        shutil.rmtree(corpus)
        shutil.rmtree(folder / "originals")
    return lines


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """One rank's first row, in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def first_row(settings: dict[str, Any]) -> dict[str, float]:
    """Open the corpus as one rank of many, and wait for its first row."""
    ranks = settings["ranks"]
    spec = stream_spec((Path(settings["corpus"]),), rows=ranks, row_tokens=ROW_TOKENS, lanes=ranks)
    import_megabytes = peak_megabytes("self")
    started, cpu_started = time.perf_counter(), time.process_time()
    with RowStream(spec, 0, ranks, first_step=settings["step"], prefetch_steps=settings["prefetch"]) as stream:
        next(stream)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        reader = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()[0:1] or ["self"]
        peak = peak_megabytes(reader[0])
    return {
        "first_row_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_megabytes": peak,
        "import_megabytes": import_megabytes,
    }


def peak_megabytes(process: str) -> float:
    """The most memory that a process has had. (`ru_maxrss` of a new process begins at that of the one that made it.)"""
    status = dict(line.split(":", 1) for line in Path("/proc", process, "status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to make the shards (default: a temporary one)"
    )
    parser.add_argument("--quick", action="store_true", help="few shards, one round: does it run?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(first_row(json.loads(args.measure))))
        return
    if args.quick:
        args.shards, args.ranks, args.rounds = [100], 64, 1
    with tempfile.TemporaryDirectory(prefix="dstrain-bench-", dir=args.folder) as folder:
        lines = growth_lines(args, Path(folder))
    print(json.dumps(lines) if args.json else table(lines))


if __name__ == "__main__":
    main()
