"""Checkpoints made by hand, in milliseconds and without ranks: what verification and the commands see."""

from dataclasses import replace
from pathlib import Path

import torch

from dstrain.base.durable import write_durably
from dstrain.checkpoint.files import write_safetensors
from dstrain.checkpoint.fragments import fragment_key, share
from dstrain.checkpoint.manifest import MANIFEST, Manifest, checkpoint_folder

STATES = ["weight", "exp_avg", "exp_avg_sq"]
SHAPES = {"embed": [7, 3], "norm": [5], "scale": [1]}


def synthetic_checkpoint(
    run_dir: Path, step: int, *, world_size: int = 2, scores: dict[str, float] | None = None
) -> Path:
    """A committed checkpoint of three small parameters, saved by `world_size` ranks."""
    folder = checkpoint_folder(run_dir, step)
    folder.mkdir(parents=True)
    files = {}
    for rank in range(world_size):
        pieces = []
        for name, shape in SHAPES.items():
            numel = torch.Size(shape).numel()
            start, stop = share(numel, rank, world_size)
            if start < stop:
                pieces += [(fragment_key(name, s, start), torch.arange(start, stop).float() + step) for s in STATES]
        file = f"rank-{rank:05d}.safetensors"
        written = write_safetensors(folder / file, pieces)
        files[file] = written.entry()
    write_durably(folder / MANIFEST, replace(synthetic_manifest(step, files), scores=scores or {}).text())
    return folder


def synthetic_manifest(step: int, files: dict[str, dict[str, object]]) -> Manifest:
    """The manifest of such a checkpoint."""
    return Manifest(
        step=step,
        data_step=step,
        optimizer_steps=step,
        rollbacks=0,
        learning_rate=1e-3,
        rng={"scheme": "counter", "seed": 0},
        identity={},
        topology={"world_size": 2, "zero_stage": 1, "precision": "bf16"},
        model_config={},
        parameters={name: {"shape": shape, "states": STATES} for name, shape in SHAPES.items()},
        files=files,
    )
