"""How fast rows come, and how soon after a resume: this project's stream beside what its users would take otherwise.

    python tools/bench/stream.py                            # tokens per second, every contestant on one core
    python tools/bench/stream.py --mosaic-venv DIR --make-mosaic-venv
    python tools/bench/stream.py --resume                   # first row at 0 % and at 99 % of 10 million documents

All contestants read the same documents (log-normal lengths: median 180 tokens, mean about 300), each from its own
format on the local disk, pack them into full rows and mask them. They run one at a time in fresh processes pinned to
one core, in a new order each round; what is printed is the median over the rounds, the range, and the ratio to this
project's stream in its own process. `dstrain-background` may use a second core. The page cache is warm for all.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packing import CLS_ID, FIRST_ORDINARY_ID, MASK_ID, REPLACE, SEP_ID, VOCAB_SIZE

from dstrain.data.locate import locate
from dstrain.data.masking import Vocabulary
from dstrain.data.producer import StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.writer import write_token_shards

HERE = Path(__file__).resolve().parent
SHARD_DOCUMENTS = 10_000
MOSAIC_REQUIREMENTS = ("mosaicml-streaming>=0.13,<0.14", "torch>=2.8,<2.14", "numpy<3")
OURS = ("dstrain", "dstrain-background")
THEIRS = ("webdataset", "webdataset-documents", "datasets", "datasets-arrow")
MOSAIC = "mosaicml-streaming"


def documents(count: int) -> Iterator[NDArray[np.uint16]]:
    """Random documents with realistic lengths, [CLS] and [SEP] in place."""
    rng = np.random.default_rng(0)
    for length in np.clip(rng.lognormal(np.log(180), 1.0, count), 4, 8000).astype(int).tolist():
        document = rng.integers(FIRST_ORDINARY_ID, VOCAB_SIZE, length, dtype=np.uint16)
        document[0], document[-1] = CLS_ID, SEP_ID
        yield document


def write_formats(folder: Path, count: int, mosaic_python: Path | None) -> int:
    """The same documents in everybody's format. Returns the number of tokens."""
    import pyarrow
    import pyarrow.parquet
    import webdataset

    everything = list(documents(count))
    index = write_token_shards(
        folder / "tokens", everything, vocab_size=VOCAB_SIZE, tokenizer=None, shard_bytes=1 << 23
    )
    for name in ("documents", "parquet", "raw"):  # raw: what the other environment makes its shards from
        (folder / name).mkdir()
    for number, first in enumerate(range(0, count, SHARD_DOCUMENTS)):
        part = everything[first : first + SHARD_DOCUMENTS]
        with webdataset.TarWriter(str(folder / "documents" / f"train-{number:06d}.tar")) as sink:
            for place, document in enumerate(part):
                sink.write({"__key__": f"{number:06d}-{place:08d}", "npy": document})
        column = pyarrow.array(part, pyarrow.list_(pyarrow.uint16()))
        table = pyarrow.table({"input_ids": column})
        pyarrow.parquet.write_table(table, folder / "parquet" / f"train-{number:06d}.parquet")
    if mosaic_python is not None:
        np.save(folder / "raw" / "ids.npy", np.concatenate(everything))
        np.save(folder / "raw" / "ends.npy", np.cumsum([len(document) for document in everything]))
        arguments = [str(folder / "raw" / "ids.npy"), str(folder / "raw" / "ends.npy"), str(folder / "mds")]
        subprocess.run([mosaic_python, HERE / "mosaic.py", *arguments], check=True)
    return sum(shard.tokens or 0 for shard in index.shards)


def make_mosaic_venv(folder: Path) -> None:
    """A virtual environment of its own: its dependencies are many, and none of ours."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *MOSAIC_REQUIREMENTS], check=True)


def measure(name: str, settings: dict[str, Any], mosaic_python: Path | None) -> dict[str, float]:
    """One round of one contestant, in a fresh process on one core (two for the background process)."""
    python = mosaic_python if name == MOSAIC else Path(sys.executable)
    cores = sorted(os.sched_getaffinity(0))[: 2 if name == "dstrain-background" else 1]
    threads = ["OMP_NUM_THREADS=1", "TOKENIZERS_PARALLELISM=false", "ARROW_NUM_THREADS=1", "HF_HUB_OFFLINE=1"]
    done = subprocess.run(
        [
            "env",
            *threads,
            f"PYTHONPATH={HERE.parent.parent}",
            str(python),
            str(HERE / "contestants.py"),
            name,
            json.dumps(settings),
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rounds of all contestants; a line of the result for each."""
    mosaic_python = args.mosaic_venv / "bin" / "python" if args.mosaic_venv else None
    names = [
        name for name in (*OURS, *THEIRS, *([MOSAIC] if mosaic_python else [])) if not args.only or name in args.only
    ]
    started = time.perf_counter()
    tokens = write_formats(folder, args.documents, mosaic_python)
    print(
        f"{args.documents:,} documents, {tokens:,} tokens written in {time.perf_counter() - started:.0f} s",
        file=sys.stderr,
    )
    settings = {
        "folder": str(folder),
        "rows": args.rows,
        "row_tokens": args.row_tokens,
        "masking_rate": args.masking_rate,
        "lanes": args.lanes,
        "seconds": args.seconds,
        "warmup_batches": 2,
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_number in range(args.rounds):
        for name in random.Random(round_number).sample(names, len(names)):
            results[name].append(measure(name, settings, mosaic_python))
            speed = results[name][-1]["tokens_per_second"] / 1e6
            print(f"round {round_number + 1}: {name} {speed:.2f} M tokens/s", file=sys.stderr)
    return [summary(name, rounds, results.get("dstrain")) for name, rounds in results.items()]


def summary(name: str, rounds: list[dict[str, float]], reference: list[dict[str, float]] | None) -> dict[str, Any]:
    """Medians over the rounds; the ratio is taken round by round, so that a slow minute hits both."""
    speeds = [result["tokens_per_second"] for result in rounds]
    line: dict[str, Any] = {
        "contestant": name,
        "million_tokens_per_second": round(statistics.median(speeds) / 1e6, 2),
        "lowest": round(min(speeds) / 1e6, 2),
        "highest": round(max(speeds) / 1e6, 2),
        # Of the measured process: the background process's own time is not in it.
        "million_tokens_per_cpu_second": "-"
        if name == "dstrain-background"
        else round(median_of(rounds, "tokens_per_cpu_second") / 1e6, 2),
        "first_batch_seconds": round(median_of(rounds, "first_batch_seconds"), 2),
    }
    if reference is not None:
        ratios = [ours["tokens_per_second"] / speed for ours, speed in zip(reference, speeds, strict=True)]
        line["dstrain_is_times_faster"] = round(statistics.median(ratios), 2)
    return line


def median_of(rounds: Iterable[dict[str, float]], key: str) -> float:
    """The median of one measurement over the rounds."""
    return statistics.median(result[key] for result in rounds)


def resume(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds from opening the stream to the first step, at 0 % and 99 % of a corpus of many names of one shard."""
    write_token_shards(
        folder / "one", documents(SHARD_DOCUMENTS), vocab_size=VOCAB_SIZE, tokenizer=None, shard_bytes=1 << 40
    )
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(args.resume_documents // SHARD_DOCUMENTS):
        (corpus / f"train-{number:06d}.tar").hardlink_to(folder / "one" / "train-000000.tar")
    count = sum(shard.summary.documents for shard in locate(str(corpus)).shards)
    spec = StreamSpec(
        corpus=str(corpus),
        sequence_length=args.row_tokens,
        lanes=args.lanes,
        global_batch_rows=args.rows,
        seed=0,
        shuffle_window=1024,
        masking_rate=args.masking_rate,
        masking_replace=REPLACE,
        tokenizer=None,
        vocabulary=Vocabulary(VOCAB_SIZE, MASK_ID, tuple(range(FIRST_ORDINARY_ID))),
    )
    late = np.array([(0, int(0.99 * (count // args.lanes)), 1)] * args.lanes, np.int64)
    lines = []
    for prefetch_steps in (0, 4):
        seconds: dict[str, list[float]] = {"start": [], "late": []}
        for _ in range(args.rounds):
            for place, cursors in (("start", None), ("late", late)):
                started = time.perf_counter()
                with RowStream(spec, 0, 1, cursors=cursors, prefetch_steps=prefetch_steps) as stream:
                    next(stream)
                seconds[place].append(time.perf_counter() - started)
        start, end = statistics.median(seconds["start"]), statistics.median(seconds["late"])
        lines.append(
            {
                "documents": count,
                "background": prefetch_steps > 0,
                "first_step_seconds_at_0_percent": round(start, 4),
                "first_step_seconds_at_99_percent": round(end, 4),
                "ratio": round(end / start, 3),
            }
        )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Aligned columns under the keys of the lines."""
    rows = [list(lines[0]), *[[str(value) for value in line.values()] for line in lines]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=512, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--masking-rate", type=float, default=0.3)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of one measurement (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *THEIRS, MOSAIC), help="these contestants")
    parser.add_argument("--mosaic-venv", type=Path, metavar="DIR", help="environment with mosaicml-streaming")
    parser.add_argument("--make-mosaic-venv", action="store_true", help="make it there first, with pip")
    parser.add_argument("--resume", action="store_true", help="measure the time to the first row instead")
    parser.add_argument("--resume-documents", type=int, default=10_000_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.make_mosaic_venv:
        make_mosaic_venv(args.mosaic_venv)
    with tempfile.TemporaryDirectory(prefix="dstrain-bench-") as folder:
        lines = resume(args, Path(folder)) if args.resume else compare(args, Path(folder))
    print(json.dumps(lines) if args.json else table(lines))


if __name__ == "__main__":
    main()
