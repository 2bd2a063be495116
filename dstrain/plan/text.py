"""`dstrain plan`: the numbers of a plan as arithmetic that can be followed, or as JSON."""

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from dstrain.errors import EXIT_DONE
from dstrain.model.shape import frozen_parameters, model_shape, parameters_of
from dstrain.plan.batch import BatchPlan, batch_plan, corpus_tokens, legal_world_sizes, total_steps
from dstrain.plan.engine import deepspeed_config
from dstrain.plan.flops import Flops, step_flops
from dstrain.plan.heads import UNKNOWN_OUTPUTS, head_outputs
from dstrain.plan.memory import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    Memory,
    activation_bytes,
    kept_checkpoints,
    rank_memory,
    recipe_checkpoint_bytes,
)
from dstrain.recipe.files import missing_files
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, Recipe, SequenceToSequenceRecipe

STAGES = (0, 1, 2, 3)
GIB = 2**30
_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Plan:
    """Everything that `dstrain plan` prints. Memory is by ZeRO stage, without and with activation checkpointing."""

    recipe: Recipe
    batch: BatchPlan
    legal_worlds: list[int]
    steps: int | None
    parameters: dict[str, int]
    frozen: int
    checkpoint_bytes: int
    flops: Flops
    memory: dict[bool, list[Memory]]
    cpu_activations: int
    deepspeed: dict[str, Any]

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(self.parameters.values())

    @property
    def trained_parameters(self) -> int:
        """Those that the optimizer has."""
        return self.total_parameters - self.frozen


def plan_command(args: Namespace) -> int:
    """`dstrain plan RECIPE [key=value …] [--world W] [--json]`."""
    recipe = load_recipe(args.recipe, args.overrides, check_files=False).recipe
    for sentence in missing_files(recipe):
        print(f"warning: {sentence}", file=sys.stderr)
    plan = make_plan(recipe, args.world, corpus_tokens(recipe))
    print(json.dumps(plan_json(plan), indent=2) if args.json else plan_text(plan))
    return EXIT_DONE


def make_plan(recipe: Recipe, world: int, tokens_of_corpus: int | None) -> Plan:
    """Work out a plan.

    Args:
        recipe: what to train.
        world: number of ranks.
        tokens_of_corpus: of one epoch, where known; only recipes whose length is in epochs need it.

    Raises:
        RecipeError: the batch cannot be split over `world` ranks, or a pretrained model's config cannot be read.
    """
    shape = model_shape(recipe.model)
    labels = head_outputs(recipe) or UNKNOWN_OUTPUTS
    parameters = parameters_of(recipe.model, shape, recipe.objective, labels)
    frozen = frozen_parameters(recipe.model, shape)
    activations = {switch: activation_bytes(recipe, shape, checkpointing=switch) for switch in (False, True)}
    total = sum(parameters.values())
    return Plan(
        recipe=recipe,
        batch=batch_plan(recipe, world),
        legal_worlds=legal_world_sizes(recipe),
        steps=total_steps(recipe, tokens_of_corpus),
        parameters=parameters,
        frozen=frozen,
        checkpoint_bytes=recipe_checkpoint_bytes(recipe, labels),
        flops=step_flops(recipe, shape),
        memory={
            switch: [rank_memory(recipe, total, kept, world, stage, frozen) for stage in STAGES]
            for switch, kept in activations.items()
        },
        cpu_activations=activation_bytes(
            recipe, shape, checkpointing=recipe.model.activation_checkpointing, on_cpu=True
        ),
        deepspeed=deepspeed_config(recipe, world),
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's numbers as JSON: bytes, operations and counts."""
    recipe, total = plan.recipe, plan.total_parameters
    return {
        "name": recipe.name,
        "task": recipe.task,
        "batch": {
            "world": plan.batch.world,
            "micro_batch_rows": plan.batch.micro_batch_rows,
            "accumulation": plan.batch.accumulation,
            "rows": plan.batch.rows,
            "tokens": plan.batch.tokens,
        },
        "legal_world_sizes": plan.legal_worlds,
        "steps": plan.steps,
        "tokens": None if plan.steps is None else plan.steps * plan.batch.tokens,
        "parameters": plan.parameters | {"total": total, "trained": plan.trained_parameters},
        "flops": {
            "forward_per_token": plan.flops.forward,
            "model_per_token": plan.flops.model,
            "executed_per_token": plan.flops.executed,
            "model_per_step": plan.flops.model * plan.batch.tokens,
            "executed_per_step": plan.flops.executed * plan.batch.tokens,
        },
        "memory_bytes": [
            {"stage": stage, "activation_checkpointing": switch} | memory.by_part()
            for switch, by_stage in plan.memory.items()
            for stage, memory in zip(STAGES, by_stage, strict=True)
        ],
        "activation_bytes_on_cpu": plan.cpu_activations,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints_bytes": plan.checkpoint_bytes * (kept_checkpoints(recipe, plan.steps) + 1),
        "deepspeed": plan.deepspeed,
    }


def plan_text(plan: Plan) -> str:
    """Return the plan as text for people."""
    sections = {
        "Batch": [str(plan.batch), f"legal numbers of ranks: {_listed(plan.legal_worlds)}"],
        "Length": [_length(plan)],
        "Parameters": _parameters(plan),
        "FLOPs": _flops(plan),
        _memory_heading(plan): _memory(plan),
        "Checkpoints": _checkpoints(plan),
        "DeepSpeed's config": json.dumps(plan.deepspeed, indent=2).splitlines(),
    }
    ranks = f"{plan.batch.world} rank{'s' if plan.batch.world != 1 else ''}"
    lines = [f"{plan.recipe.name}: {plan.recipe.task} of {plan.recipe.model.architecture} on {ranks}"]
    for heading, body in sections.items():
        lines += ["", heading, *(f"  {line}" for line in body)]
    return "\n".join(lines)


# ---------------------------------------------------------------- sections


def _length(plan: Plan) -> str:
    if plan.steps is None:
        return (
            f"{plan.recipe.train.epochs:g} epochs; steps unknown until the corpus is indexed (`dstrain shards index`)"
        )
    tokens = plan.steps * plan.batch.tokens
    return f"{plan.steps:,} steps × {plan.batch.tokens:,} tokens = {tokens:,} tokens"


def _parameters(plan: Plan) -> list[str]:
    rows = [*plan.parameters.items(), ("total", plan.total_parameters)]
    if plan.frozen:
        rows.append(("of them trained", plan.trained_parameters))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {count:>15,}" for name, count in rows]
    unknown = head_outputs(plan.recipe) is None
    if unknown and not isinstance(plan.recipe, MaskedLmRecipe | SequenceToSequenceRecipe):
        lines.append(f"for {UNKNOWN_OUTPUTS} labels; a label more is hidden_size + 1 parameters more")
    return lines


def _flops(plan: Plan) -> list[str]:
    flops, tokens = plan.flops, plan.batch.tokens
    parts = f"{_si(flops.matmuls)} matmuls + {_si(flops.attention)} attention + {_si(flops.head)} head"
    lines = [
        f"forward, per token   {parts} = {_si(flops.forward)}",
        f"training, per token  3 × {_si(flops.forward)} = {_si(flops.model)}  (backward is twice forward)",
    ]
    if flops.activation_checkpointing:
        again = flops.matmuls + flops.attention
        lines.append(f"                     + {_si(again)} to compute activations again = {_si(flops.executed)}")
    lines.append(f"per step             {tokens:,} tokens × {_si(flops.executed)} = {_si(flops.executed * tokens)}")
    if plan.steps is not None:
        total = flops.executed * tokens * plan.steps
        lines.append(f"whole run            {plan.steps:,} steps × {_si(flops.executed * tokens)} = {_si(total)}")
    return lines


def _memory_heading(plan: Plan) -> str:
    train, length = plan.recipe.train, plan.recipe.data.row_tokens
    return (
        f"Memory of a rank in GiB ({train.precision}, {train.micro_batch_rows} rows of {length} tokens; * the recipe's)"
    )


def _memory(plan: Plan) -> list[str]:
    plain, checkpointed = plan.memory[False], plan.memory[True]
    stage, switch = plan.recipe.train.zero.stage, plan.recipe.model.activation_checkpointing
    rows: list[tuple[str, list[int]]] = [
        (name, [getattr(memory, name) for memory in plain]) for name in ("weights", "gradients", "optimizer", "buffers")
    ]
    rows += [
        ("activations", [memory.activations for memory in plain]),
        ("activations, checkpointed", [memory.activations for memory in checkpointed]),
        ("fp32 gradients in the step", [memory.step for memory in plain]),
        ("total" if switch else "total *", [memory.total for memory in plain]),
        ("total, checkpointed" + (" *" if switch else ""), [memory.total for memory in checkpointed]),
    ]
    if any(memory.host for memory in plain):
        rows.append(("offloaded to the host", [memory.host for memory in plain]))
    width = max(len(name) for name, _ in rows)
    heads = [f"stage {number}{' *' if number == stage else ''}" for number in STAGES]
    lines = [f"{'ZeRO':{width}}" + "".join(f"{head:>11}" for head in heads)]
    lines += [f"{name:{width}}" + "".join(f"{size / GIB:11.3f}" for size in sizes) for name, sizes in rows]
    lines.append(
        "total = weights + gradients + optimizer + buffers + the larger of activations and the step's gradients"
    )
    lines.append(f"On a CPU, whose kernels keep more, the recipe's activations take {plan.cpu_activations / GIB:.3f}.")
    return lines


def _checkpoints(plan: Plan) -> list[str]:
    size = plan.checkpoint_bytes
    keep, every = kept_checkpoints(plan.recipe, plan.steps), plan.recipe.checkpoint.every_steps
    parameters = f"{plan.trained_parameters:,} parameters × {CHECKPOINT_BYTES_PER_PARAMETER} bytes"
    frozen = size - plan.trained_parameters * CHECKPOINT_BYTES_PER_PARAMETER
    beside = f" + {_gb(frozen)} of frozen weights" if frozen else ""
    return [
        f"{parameters} (fp32 weights and two moments){beside} = {_gb(size)}",
        f"{keep} kept + 1 being written = {_gb((keep + 1) * size)}; one every {every:,} steps",
    ]


def _listed(numbers: list[int], most: int = 16) -> str:
    if len(numbers) <= most:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[: most - 1]))} … {numbers[-1]} ({len(numbers)} of them)"


def _si(value: float) -> str:
    for factor, unit in _UNITS:
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
