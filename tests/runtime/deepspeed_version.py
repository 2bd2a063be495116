"""Run as a program, with some DeepSpeed first on PYTHONPATH: 2 ranks train, save and load under ZeRO 1, 2 and 3.

python deepspeed_version.py RECIPE FOLDER     prints the version that was imported
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_ranks import job
from ranks import run_ranks

from dstrain.recipe.load import load_recipe

SETTINGS = [f"train.zero.stage={stage}" for stage in (1, 2, 3)]


def train_save_and_load(rank: int, world_size: int, path: Path, folder: Path) -> tuple[str, list[list[float]]]:
    """Save under each stage, load under the next, and go on. Returns DeepSpeed's version and losses by stage."""
    import deepspeed

    losses = []
    for number, setting in enumerate(SETTINGS):
        run = job(load_recipe(path, [setting, "train.precision=fp32"]).recipe)
        before = run.train(2)
        run.save(folder / str(number))
        saved = _by_key(run.resident())
        loaded = job(load_recipe(path, [SETTINGS[(number + 1) % 3], "train.precision=fp32"]).recipe)
        loaded.resume(folder / str(number))
        for key, (offset, elements) in _by_key(loaded.resident()).items():
            for index, element in enumerate(elements, offset):
                if key in saved and 0 <= index - saved[key][0] < len(saved[key][1]):
                    assert element == saved[key][1][index - saved[key][0]], (setting, key, index)
        losses.append([loss for loss, _ in [*before, *loaded.train(2)]])
    return deepspeed.__version__, losses


def _by_key(pieces: Any) -> dict[tuple[str, str], tuple[int, Any]]:
    return {(parameter, state): (offset, elements) for parameter, state, offset, elements in pieces}


def main() -> None:
    results = run_ranks(2, train_save_and_load, Path(sys.argv[1]), Path(sys.argv[2]))
    (version, losses), (_, others) = results
    assert losses == others
    assert np.ptp(losses, axis=0).max() < 1e-5, losses  # whichever the stage
    assert losses[0][-1] < losses[0][0]
    print(version)


if __name__ == "__main__":
    main()
