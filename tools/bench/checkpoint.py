"""What a checkpoint costs: dstrain beside DeepSpeed's own, Accelerate's and torch's, on the same model and two ranks.

    python tools/bench/checkpoint.py [--size 110M|400M] [--zero-stage 1|2] [--rounds 3] [--only dstrain,…] [--json]

Each contestant has two processes of its own. In each round they write as many bytes to one file each and flush it (the
raw rate), make two training steps, and save while training goes on. Then they read and load, with nothing of the files
in the page cache. All ratios are taken round by round within one contestant's run, and the median is shown.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

WORLD = 2
NAMES = ("dstrain-async", "dstrain", "deepspeed", "accelerate", "dcp", "dcp-async", "dcp-staged")
SCRIPT = Path(__file__).with_name("checkpoint_contestants.py")


def run(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """What each rank of a contestant found."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(WORLD):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "LOCAL_WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "1048576",  # what is freed is given back, so that the peak is that of live memory
        }
        arguments = [name, options.size, str(options.zero_stage), str(options.rounds), str(folder)]
        log = (folder / f"log-{rank}").open("w")
        ranks.append(
            subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment, stdout=log, stderr=log)
        )
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.2)
    if any(rank.returncode for rank in ranks):
        print(*((folder / f"log-{rank}").read_text()[-3000:] for rank in range(WORLD)), sep="\n", file=sys.stderr)
        raise SystemExit(f"{name} failed")
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(WORLD)]
    shutil.rmtree(folder)
    return found


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' figures as one: the later rank's time in each round, the sum of bytes."""
    times = ("step", "raw_write", "stall", "lost", "total", "on_disk", "raw_read", "load", "verify")
    one = {name: [max(both) for both in zip(*(rank[name] for rank in ranks), strict=True)] for name in times}
    one["own_bytes"] = sum(rank["own_bytes"] for rank in ranks)
    one["extra_memory_bytes"] = sum(rank["extra_memory_bytes"] for rank in ranks)
    return one | {name: ranks[0][name] for name in ("saved_bytes", "parameters")}


def summary(one: dict[str, Any]) -> dict[str, float | None]:
    """Medians, and ratios of rounds."""

    def ratio(above: str, below: str) -> float | None:
        return median(a / b for a, b in zip(one[above], one[below], strict=True)) if one[above] else None

    return {
        "GB": one["saved_bytes"] / 1e9,
        "step s": median(one["step"]),
        "stall s": median(one["stall"]),
        "training later by s": median(one["lost"]),
        "total s": median(one["total"]),
        "on disk s": median(one["on_disk"]),
        "raw write s": median(one["raw_write"]),
        "write ÷ raw": ratio("raw_write", "on_disk"),
        "load s": median(one["load"]),
        "raw read s": median(one["raw_read"]),
        "load ÷ raw": ratio("raw_read", "load"),
        "verify GB/s": one["own_bytes"] / 1e9 / median(one["verify"]) if one["verify"] else None,
        "extra memory GB": one["extra_memory_bytes"] / 1e9,
    }


def table(found: dict[str, dict[str, float | None]]) -> str:
    """A row for each contestant."""
    heads = ["", *next(iter(found.values()))]
    rows = [[name, *("" if value is None else f"{value:.2f}" for value in one.values())] for name, one in found.items()]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="what a checkpoint costs")
    parser.add_argument("--size", choices=("110M", "400M", "4M"), default="110M", help="parameters; 4M: to try it out")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--dir", type=Path, help="on which disk; a temporary folder is made there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for name in options.only.split(","):
            one = together(run(name, options, Path(folder) / name))
            found[name] = summary(one)
            print(name, file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{options.size}, {one['parameters']:,} parameters, {WORLD} ranks, ZeRO-{options.zero_stage}\n")
        print(table(found))


if __name__ == "__main__":
    main()
