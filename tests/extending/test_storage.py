"""A storage and a tracker from another package, in one file each: the files that docs/extending.md shows."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from extension_package import InstallExtension, documented_file

from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.ranks


def test_a_run_keeps_its_checkpoints_in_a_database_and_tracks_its_numbers(
    install_extension: InstallExtension, tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    extension = install_extension(
        {name: documented_file(f"{name}.py") for name in ("sqlite_storage", "csv_tracker")},
        {
            "dstrain.storages": {"sqlite": "sqlite_storage:STORAGE"},
            "dstrain.trackers": {"csv": "csv_tracker:CsvTracker"},
        },
    )
    storage, run_dir = f"sqlite://{tmp_path}/store.db/runs/tiny", tmp_path / "run"
    path = tmp_path / "tiny.yaml"
    path.write_text(
        resolved_yaml(
            tiny_recipe(
                "train.steps=4", "schedule.warmup_steps=1", f"checkpoint.storage={storage}", "evaluate.batches=1"
            )
        )
    )

    def train(ranks: int, *overrides: str) -> str:
        options = ["--run-dir", str(run_dir), "--procs-per-node", str(ranks), "log.trackers=[csv]", *overrides]
        return extension.dstrain("run", str(path), *options)

    extension.dstrain("run", str(path), "log.trackers=[no_such]", "--dry-run", exit_code=2)
    train(2)
    train(1, "train.steps=6")
    assert not (run_dir / "checkpoints").exists()
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {each["step"]: each["loss"] for each in steps if "loss" in each}
    assert list(losses) == [1, 2, 3, 4, 5, 6], "the second attempt goes on where the first one ended"
    with (run_dir / "tracked.csv").open(newline="") as file:
        tracked = {int(step): float(value) for _, step, name, value in csv.reader(file) if name == "loss"}
    assert tracked == losses
    listed = json.loads(extension.dstrain("ckpt", "ls", storage, "--json"))
    assert "step-0000000006" in json.dumps(listed)
    extension.dstrain("ckpt", "verify", storage)
    extension.dstrain("ckpt", "export", storage, "--out", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    extension.dstrain("ckpt", "verify", f"{storage}/step-0000000005", exit_code=2)
