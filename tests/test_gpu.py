"""What only a GPU can show. Skipped without one; then these lines have not been tried."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import Runtime
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.main import build_task, prepare
from dstrain.train.reporting import Reporter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def train(rank: int, world_size: int, recipe: Recipe, run_dir: Path) -> tuple[str, str]:
    runtime = Runtime.start(recipe)
    task = build_task(recipe, runtime)
    prepare(runtime, task)
    with Reporter(runtime, recipe, run_dir, 1, task.totals.steps) as report:
        outcome = Loop(runtime, task, run_dir, report, StopRequest()).run()
    device = runtime.device.type
    runtime.close()
    return outcome, device


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_trains_saves_and_resumes_over_nccl(stage: int, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ["train.precision=bf16", f"train.zero.stage={stage}"]
    first = tiny_recipe(*overrides, "train.steps=4")
    assert run_ranks(1, train, first, tmp_path) == [("done", "cuda")]
    longer = tiny_recipe(*overrides, "train.steps=8")
    assert run_ranks(1, train, longer, tmp_path) == [("done", "cuda")]
    assert (tmp_path / "checkpoints" / "step-0000000008").is_dir()
