"""How fast rows come, and how soon after a resume: this project's stream beside what its users would take otherwise.

    python tools/bench/stream.py                            # tokens per second, every contestant on one core
    python tools/bench/stream.py --peers build/peers --make-peers   # with mosaicml-streaming, LitData and Grain
    python tools/bench/stream.py --resume                   # first row at step 0 and at step 10⁹

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from corpora import documents, median_of, table, write_linked_corpus, write_tokens
from numpy.typing import NDArray
from peers import PEER_OF, PEERS, make_environment, python_of, write_format
from specs import mixture_folders, stream_spec

from dstrain.data.stream import RowStream

HERE = Path(__file__).resolve().parent
SHARD_DOCUMENTS = 10_000
RESUME_STEPS = (0, 1000, 10**9)
OURS = ("dstrain", "dstrain-mixture", "dstrain-background")
THEIRS = ("webdataset", "webdataset-documents", "datasets", "datasets-arrow")


def write_formats(folder: Path, count: int, contestants: Sequence[str], environments: Path | None) -> int:
    """The same documents in the format of every contestant. Returns the number of tokens."""
    everything = list(documents(count))
    write_tokens(folder / "tokens", everything)
    if "dstrain-mixture" in contestants:
        sources = mixture_folders(folder)
        for number, source in enumerate(sources):
            write_tokens(source, everything[number :: len(sources)])
    if "webdataset-documents" in contestants:
        write_webdataset(folder / "documents", everything)
    if {"datasets", "datasets-arrow"} & set(contestants):
        write_parquet(folder / "parquet", everything)
    peers = {PEER_OF[contestant] for contestant in contestants if contestant in PEER_OF}
    if peers:
        assert environments is not None
        raw = folder / "raw"  # what the other environments make their shards from
        raw.mkdir()
        np.save(raw / "ids.npy", np.concatenate(everything))
        np.save(raw / "ends.npy", np.cumsum([len(document) for document in everything]))
        for peer in sorted(peers):
            write_format(environments, peer, raw, folder / peer)
    return sum(map(len, everything))


def write_webdataset(folder: Path, everything: Sequence[NDArray[np.uint16]]) -> None:
    """A tar sample per document."""
    import webdataset

    folder.mkdir()
    for number, first in enumerate(range(0, len(everything), SHARD_DOCUMENTS)):
        with webdataset.TarWriter(str(folder / f"train-{number:06d}.tar")) as sink:
            for place, document in enumerate(everything[first : first + SHARD_DOCUMENTS]):
                sink.write({"__key__": f"{number:06d}-{place:08d}", "npy": document})


def write_parquet(folder: Path, everything: Sequence[NDArray[np.uint16]]) -> None:
    """A row per document, a list of ids."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for number, first in enumerate(range(0, len(everything), SHARD_DOCUMENTS)):
        part = everything[first : first + SHARD_DOCUMENTS]
        table = pyarrow.table({"input_ids": pyarrow.array(part, pyarrow.list_(pyarrow.uint16()))})
        pyarrow.parquet.write_table(table, folder / f"train-{number:06d}.parquet")


def measure(name: str, settings: dict[str, Any], environments: Path | None) -> dict[str, float]:
    """One round of one contestant, in a fresh process on one core (two for the background process)."""
    python = Path(sys.executable)
    if name in PEER_OF:
        assert environments is not None
        python = python_of(environments, PEER_OF[name])
    cores = sorted(os.sched_getaffinity(0))[: 2 if name == "dstrain-background" else 1]
    environment = [
        "OMP_NUM_THREADS=1",
        "TOKENIZERS_PARALLELISM=false",
        "ARROW_NUM_THREADS=1",
        "HF_HUB_OFFLINE=1",
        "LITDATA_DISABLE_VERSION_CHECK=1",
        f"PYTHONPATH={HERE.parent.parent}",
    ]
    done = subprocess.run(
        ["env", *environment, str(python), str(HERE / "contestants.py"), name, json.dumps(settings)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def contestants_of(args: argparse.Namespace) -> list[str]:
    """Who takes part: those that were asked for, and by default everybody whose environment there is."""
    available = [*OURS, *THEIRS, *(PEER_OF if args.peers else ())]
    if missing := [name for name in args.only or () if name not in available]:
        raise SystemExit(f"{missing[0]} has an environment of its own; say where: --peers build/peers --make-peers")
    return [name for name in available if not args.only or name in args.only]


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rounds of all contestants; a line of the result for each."""
    names = contestants_of(args)
    for peer in PEERS if args.make_peers else ():
        if any(PEER_OF.get(name) == peer for name in names):
            make_environment(args.peers, peer)
    started = time.perf_counter()
    tokens = write_formats(folder, args.documents, names, args.peers)
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
            results[name].append(measure(name, settings, args.peers))
            speed = results[name][-1]["tokens_per_second"] / 1e6
            print(f"round {round_number + 1}: {name} {speed:.2f} M tokens/s", file=sys.stderr)
    return [summary(name, rounds, results.get("dstrain")) for name, rounds in results.items()]


def summary(name: str, rounds: list[dict[str, float]], reference: list[dict[str, float]] | None) -> dict[str, Any]:
    """Medians over the rounds; the ratio is taken round by round, so that a slow minute hits both."""
    speeds = [result["tokens_per_second"] for result in rounds]
    on_two_cores = name == "dstrain-background"  # whose second process's time is not counted
    line: dict[str, Any] = {
        "contestant": name,
        "million_tokens_per_second": round(statistics.median(speeds) / 1e6, 2),
        "lowest": round(min(speeds) / 1e6, 2),
        "highest": round(max(speeds) / 1e6, 2),
        "million_tokens_per_cpu_second": "-"
        if on_two_cores
        else round(median_of(rounds, "tokens_per_cpu_second") / 1e6, 2),
        "first_batch_seconds": round(median_of(rounds, "first_batch_seconds"), 2),
    }
    if reference is not None:
        line["dstrain_is_times_faster"] = ratio(reference, rounds, "tokens_per_second")
        line["by_cpu_time"] = "-" if on_two_cores else ratio(reference, rounds, "tokens_per_cpu_second")
    return line


def ratio(reference: list[dict[str, float]], rounds: list[dict[str, float]], key: str) -> float:
    """The median over the rounds of the reference's speed ÷ the other's."""
    return round(statistics.median(ours[key] / other[key] for ours, other in zip(reference, rounds, strict=True)), 2)


def resume(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds from opening the stream to the first step, at step 0 and far on, for a corpus of many shards."""
    corpus = folder / "corpus"
    tokens = write_linked_corpus(corpus, folder / "originals", args.resume_shards, SHARD_DOCUMENTS)
    spec = stream_spec((corpus,), rows=args.rows, row_tokens=args.row_tokens, lanes=args.lanes)
    lines = []
    for prefetch_steps in (0, 4):
        seconds: dict[int, list[float]] = {step: [] for step in RESUME_STEPS}
        for round_number in range(args.rounds):
            for step in random.Random(round_number).sample(RESUME_STEPS, len(RESUME_STEPS)):
                started = time.perf_counter()
                with RowStream(spec, 0, 1, first_step=step, prefetch_steps=prefetch_steps) as stream:
                    next(stream)
                seconds[step].append(time.perf_counter() - started)
        line: dict[str, Any] = {"tokens": tokens, "background": prefetch_steps > 0}
        for step, measured in seconds.items():
            line[f"seconds at step {step:,}"] = round(statistics.median(measured), 3)
        for step in RESUME_STEPS[:-1]:
            ratios = [far / near for near, far in zip(seconds[step], seconds[RESUME_STEPS[-1]], strict=True)]
            line[f"last ÷ step {step:,}"] = round(statistics.median(ratios), 2)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=512, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--masking-rate", type=float, default=0.3)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of one measurement (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *THEIRS, *PEER_OF), help="these contestants")
    parser.add_argument("--peers", type=Path, metavar="DIR", help=f"environments of {', '.join(PEERS)}")
    parser.add_argument("--make-peers", action="store_true", help="make those that are needed there first, with pip")
    parser.add_argument("--resume", action="store_true", help="measure the time to the first row instead")
    parser.add_argument("--resume-shards", type=int, default=1000, help="of 10,000 documents (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small corpus and one short round: does it run?")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.make_peers and not args.peers:
        parser.error("--make-peers needs a folder for them: --peers build/peers")
    if args.quick:
        args.documents, args.rounds, args.seconds, args.rows, args.resume_shards = 2000, 1, 0.2, 64, 4
    with tempfile.TemporaryDirectory(prefix="dstrain-bench-") as folder:
        lines = resume(args, Path(folder)) if args.resume else compare(args, Path(folder))
    print(json.dumps(lines) if args.json else table(lines))


if __name__ == "__main__":
    main()
