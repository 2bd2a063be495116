"""How fast `dstrain ckpt verify` reads: a synthetic checkpoint, beside sha256sum and cat of the same files.

    python tools/bench/verify.py [--gigabytes 5] [--ranks 2] [--rounds 3]

Files lie in the page cache where they fit; then the digest is what costs, and the ratio to sha256sum is the finding.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dstrain.checkpoint.files import write_durably, write_safetensors
from dstrain.checkpoint.fragments import fragment_key, share
from dstrain.checkpoint.manifest import MANIFEST, Manifest, checkpoint_folder
from dstrain.checkpoint.verify import verify

STATES = ["weight", "exp_avg", "exp_avg_sq"]
ROWS = 768


def synthetic(run_dir: Path, gigabytes: float, ranks: int) -> Path:
    """A committed checkpoint of one parameter with its moments."""
    numel = int(gigabytes * 1e9 / 4 / len(STATES)) // ROWS * ROWS
    folder = checkpoint_folder(run_dir, 1)
    folder.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        start, stop = share(numel, rank, ranks)
        values = torch.randn(stop - start)
        name = f"rank-{rank:05d}.safetensors"
        pieces = [(fragment_key("embed", state, start), values) for state in STATES]
        written = write_safetensors(folder / name, pieces)
        files[name] = written.entry()
    manifest = Manifest(
        step=1,
        data_step=1,
        optimizer_steps=1,
        cursors=[[0, 1, 0]],
        bad_samples=0,
        rollbacks=0,
        learning_rate=1e-3,
        rng={"scheme": "counter", "seed": 0},
        identity={},
        topology={"world_size": ranks, "zero_stage": 1, "precision": "fp32"},
        model_config={},
        parameters={"embed": {"shape": [numel // ROWS, ROWS], "states": STATES}},
        files=files,
    )
    write_durably(folder / MANIFEST, manifest.text())
    return folder


def sound(folder: Path) -> None:
    """Verify; a problem would be the benchmark's own."""
    assert verify(folder) == []


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="rate of `dstrain ckpt verify`")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = synthetic(Path(folder), options.gigabytes, options.ranks)
        names = sorted(str(path) for path in checkpoint.glob("*.safetensors"))
        total = sum(Path(name).stat().st_size for name in names)
        ways: dict[str, Callable[[], object]] = {
            "cat": lambda: subprocess.run(["cat", *names], stdout=subprocess.DEVNULL, check=True),
            "sha256sum": lambda: subprocess.run(["sha256sum", *names], stdout=subprocess.DEVNULL, check=True),
            "dstrain ckpt verify": lambda: sound(checkpoint),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, action in ways.items():
                rates[way].append(total / seconds(action) / 1e9)
        print(f"{total / 1e9:.2f} GB in {len(names)} files, medians of {options.rounds} rounds")
        for way, found in rates.items():
            print(f"  {way:<20} {median(found):5.2f} GB/s")


if __name__ == "__main__":
    main()
