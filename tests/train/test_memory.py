"""What `dstrain plan` says of a rank's memory, against a rank that trains on a CPU."""

import json
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile
from training import RecipeMaker, train_steps

from dstrain.architectures import model_shape
from dstrain.plan import activation_bytes, rank_memory
from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import Runtime
from dstrain.train.main import build_task, prepare

pytestmark = pytest.mark.ranks

# 25 million parameters, most of them in the layers; 2 × 128 tokens
SIZES = (
    "model.config.hidden_size=512", "model.config.num_hidden_layers=8", "model.config.num_attention_heads=8",
    "model.config.intermediate_size=2048", "model.config.max_position_embeddings=128", "data.sequence_length=128",
)  # fmt: skip


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class Peak:
    """Most bytes during two steps: of live tensors, and of the process over what it had before the model was built."""

    tensors: int
    resident: int


def measure(rank: int, world: int, recipe: Recipe, trace: Path) -> Peak:
    """Train two steps and return the peaks. torch's profiler counts every tensor from before the model is built on."""
    runtime = Runtime.start(recipe)
    before = resident_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task = build_task(recipe, runtime)
        prepare(runtime, task)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        with torch.profiler.record_function("training"):
            train_steps(runtime, task, 2)
        high_water = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
        )
    file = trace / f"{rank}.json"
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    begins = next(event["ts"] for event in events if event.get("name") == "training")
    live = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]" and e["ts"] >= begins]
    return Peak(max(live), int(high_water.split()[1]) * 1024 - before)


# The plan's share of the tensors' peak, least and most. Under ZeRO, gloo lets go of a collective's tensors a little
# after it: now and then one more copy of all gradients. Under stage 3 weights are gathered ahead of their use as well.
BOUNDS = {  # by stage and number of ranks; one rank without ZeRO has no buffer to reduce into
    (0, 1): (0.97, 1.15),
    (0, 2): (1.0, 1.15),
    (1, 2): (0.78, 1.1),
    (2, 1): (0.78, 1.1),
    (2, 2): (0.78, 1.1),
    (3, 2): (0.65, 1.0),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "world"), BOUNDS)
def test_the_planned_memory_is_what_a_rank_takes(
    stage: int, world: int, precision: str, tiny_recipe: RecipeMaker, tmp_path: Path
) -> None:
    recipe = tiny_recipe(f"train.zero.stage={stage}", f"train.precision={precision}", "data.prefetch_steps=0", *SIZES)
    shape = model_shape(recipe.model)
    parameters = sum(shape.parameters(recipe.task).values())
    activations = activation_bytes(recipe, shape, checkpointing=False, on_cpu=True)
    planned = rank_memory(recipe, parameters, activations, world, stage).total
    peaks = run_ranks(world, measure, recipe, tmp_path)
    tensors, resident = max(peak.tensors for peak in peaks), max(peak.resident for peak in peaks)
    print(
        f"{precision} stage {stage} × {world}: planned {planned:,}, tensors {tensors:,} ({planned / tensors:.2f}), "
        f"process {resident:,} ({planned / resident:.2f})"
    )
    least, most = BOUNDS[stage, world]
    assert least < planned / tensors < most
    assert planned < 1.05 * resident
