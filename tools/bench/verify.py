"""How fast `dstrain ckpt verify` and a load read: a synthetic checkpoint, beside plain reads of the same files.

    python tools/bench/verify.py [--gigabytes 5] [--ranks 2] [--rounds 3] [--cold]

Files lie in the page cache where they fit; then the digest is what costs, and the ratio to sha256sum is the finding.
With --cold the page cache is made to forget them before each reading, whoever reads; then the disk is what costs.
Ratios are taken round by round. `load` reads every piece to where it is wanted, without the rest of a resume: the
copies in bf16, and what ranks send each other.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dstrain.base.durable import write_durably
from dstrain.checkpoint.files import write_safetensors
from dstrain.checkpoint.fragments import fragment_key, share
from dstrain.checkpoint.load import Pieces, Wanted
from dstrain.checkpoint.manifest import MANIFEST, Manifest, checkpoint_folder
from dstrain.checkpoint.verify import verify

BLOCK_BYTES = 1 << 24
STATES = ["weight", "exp_avg", "exp_avg_sq"]
ROWS = 768


def synthetic(run_dir: Path, gigabytes: float, ranks: int) -> Path:
    """A committed checkpoint of square parameters with their moments."""
    names = [f"layer.{number}" for number in range(max(1, int(gigabytes * 1e9 / 4 / len(STATES)) // ROWS**2))]
    folder = checkpoint_folder(run_dir, 1)
    folder.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        start, stop = share(ROWS**2, rank, ranks)
        values = torch.randn(stop - start)
        pieces = [(fragment_key(name, state, start), values) for name in names for state in STATES]
        file = f"rank-{rank:05d}.safetensors"
        files[file] = write_safetensors(folder / file, pieces).entry()
    manifest = Manifest(
        step=1,
        data_step=1,
        optimizer_steps=1,
        rollbacks=0,
        learning_rate=1e-3,
        rng={"scheme": "counter", "seed": 0},
        identity={},
        topology={"world_size": ranks, "zero_stage": 1, "precision": "fp32"},
        model_config={},
        parameters={name: {"shape": [ROWS, ROWS], "states": STATES} for name in names},
        files=files,
    )
    write_durably(folder / MANIFEST, manifest.text())
    return folder


def sound(folder: Path) -> None:
    """Verify; a problem would be the benchmark's own."""
    assert verify(folder) == []


def read(names: list[str]) -> None:
    """Read files one after another, in blocks, into the same memory."""
    room = memoryview(bytearray(BLOCK_BYTES))
    for name in names:
        with Path(name).open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def load(folder: Path, into: dict[tuple[str, str], torch.Tensor]) -> None:
    """Read every state of every parameter, as a run on one rank would."""
    wanted = (Wanted(view, parameter, state, 0) for (parameter, state), view in into.items())
    Pieces(folder, Manifest.read(folder)).read(wanted)


def forget(names: list[str]) -> None:
    """Have the page cache hold nothing of some files."""
    for name in names:
        with Path(name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
    parser.add_argument("--cold", action="store_true", help="nothing of the files in the page cache")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = synthetic(Path(folder), options.gigabytes, options.ranks)
        names = sorted(str(path) for path in checkpoint.glob("*.safetensors"))
        total = sum(Path(name).stat().st_size for name in names)
        parameters = Manifest.read(checkpoint).parameters
        into = {(name, state): torch.zeros(ROWS**2) for name in parameters for state in STATES}
        ways: dict[str, Callable[[], object]] = {
            "read": lambda: read(names),
            "sha256sum": lambda: subprocess.run(["sha256sum", *names], stdout=subprocess.DEVNULL, check=True),
            "dstrain ckpt verify": lambda: sound(checkpoint),
            "load": lambda: load(checkpoint, into),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, action in ways.items():
                if options.cold:
                    forget(names)
                rates[way].append(total / seconds(action) / 1e9)
        where = "not in the page cache" if options.cold else "in the page cache"
        print(f"{total / 1e9:.2f} GB in {len(names)} files {where}, medians of {options.rounds} rounds")
        for way, found in rates.items():
            ratio = median(one / whole for one, whole in zip(found, rates["read"], strict=True))
            print(f"  {way:<20} {median(found):5.2f} GB/s  {ratio:.2f} of the plain read")


if __name__ == "__main__":
    main()
