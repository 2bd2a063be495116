"""`dstrain plan`: the numbers of a plan as arithmetic that can be followed, or as JSON."""

import json
import sys
from argparse import Namespace

from dstrain.errors import EXIT_DONE
from dstrain.optimizers import OPTIMIZERS
from dstrain.plan.as_json import plan_json
from dstrain.plan.corpus import corpus_sizes
from dstrain.plan.heads import UNKNOWN_OUTPUTS, head_outputs
from dstrain.plan.memory import kept_checkpoints, trained_checkpoint_bytes
from dstrain.plan.overview import STAGES, Plan, make_plan
from dstrain.plan.phase_text import batch_lines, data_lines, phase_lines
from dstrain.plan.units import gigabytes, quantity
from dstrain.recipe.files import missing_files
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe, SequenceToSequenceRecipe

GIB = 2**30


def plan_command(args: Namespace) -> int:
    """`dstrain plan RECIPE [key=value …] [--world W] [--json]`."""
    recipe = load_recipe(args.recipe, args.overrides, check_files=False).recipe
    for sentence in missing_files(recipe):
        print(f"warning: {sentence}", file=sys.stderr)
    plan = make_plan(recipe, args.world, corpus_sizes(recipe))
    print(json.dumps(plan_json(plan), indent=2) if args.json else plan_text(plan))
    return EXIT_DONE


def plan_text(plan: Plan) -> str:
    """Return the plan as text for people."""
    sections = {
        "Batch": batch_lines(plan),
        "Length": [_length(plan)],
        "Phases": phase_lines(plan),
        "Data": data_lines(plan),
        "Parameters": _parameters(plan),
        "FLOPs": _flops(plan),
        _memory_heading(plan): _memory(plan),
        "Checkpoints": _checkpoints(plan),
        "DeepSpeed's config": json.dumps(plan.deepspeed, indent=2).splitlines(),
    }
    ranks = f"{plan.world} rank{'s' if plan.world != 1 else ''}"
    lines = [f"{plan.recipe.name}: {plan.recipe.task} of {plan.recipe.model.architecture} on {ranks}"]
    for heading, body in sections.items():
        if body:
            lines += ["", heading, *(f"  {line}" for line in body)]
    return "\n".join(lines)


# ---------------------------------------------------------------- sections


def _length(plan: Plan) -> str:
    if plan.steps is None or plan.tokens is None:
        return (
            f"{plan.recipe.train.epochs:g} epochs; steps unknown until the corpus is indexed (`dstrain shards index`)"
        )
    if len(plan.phases) > 1:
        return f"{plan.steps:,} steps in {len(plan.phases)} phases = {plan.tokens:,} tokens"
    return f"{plan.steps:,} steps × {plan.phases[0].batch.tokens:,} tokens = {plan.tokens:,} tokens"


def _parameters(plan: Plan) -> list[str]:
    rows = [*plan.parameters.items(), ("total", plan.total_parameters)]
    if plan.frozen:
        rows.append(("of them trained", plan.trained_parameters))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {count:>15,}" for name, count in rows]
    unknown = head_outputs(plan.recipe) is None
    if unknown and not isinstance(plan.recipe, PretrainingRecipe | SequenceToSequenceRecipe):
        lines.append(f"for {UNKNOWN_OUTPUTS} labels; a label more is hidden_size + 1 parameters more")
    return lines


def _flops(plan: Plan) -> list[str]:
    if len(plan.phases) > 1:
        return _flops_of_phases(plan)
    flops, tokens = plan.phases[0].flops, plan.phases[0].batch.tokens
    parts = f"{quantity(flops.matmuls)} matmuls + {quantity(flops.attention)} attention + {quantity(flops.head)} head"
    lines = [
        f"forward, per token   {parts} = {quantity(flops.forward)}",
        f"training, per token  3 × {quantity(flops.forward)} = {quantity(flops.model)}  (backward is twice forward)",
    ]
    if flops.activation_checkpointing:
        again = quantity(flops.matmuls + flops.attention)
        lines.append(f"                     + {again} to compute activations again = {quantity(flops.executed)}")
    step = quantity(flops.executed * tokens)
    lines.append(f"per step             {tokens:,} tokens × {quantity(flops.executed)} = {step}")
    if plan.steps is not None:
        total = quantity(flops.executed * tokens * plan.steps)
        lines.append(f"whole run            {plan.steps:,} steps × {step} = {total}")
    return lines


def _flops_of_phases(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("phase", "forward, per token", "executed, per token", "per step", "all its steps")]
    total = 0.0
    for phase in plan.phases:
        assert phase.plan is not None, "a timeline has phases"
        step = phase.flops.executed * phase.batch.tokens
        total += step * phase.plan.steps
        numbers = (phase.flops.forward, phase.flops.executed, step, step * phase.plan.steps)
        rows.append((phase.plan.name, *map(quantity, numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([f"{row[0]:{widths[0]}}", *(f"{row[column]:>{widths[column]}}" for column in range(1, 5))])
        for row in rows
    ]
    return [*lines, f"whole run: {quantity(total)}"]


def _memory_heading(plan: Plan) -> str:
    rows, phase = plan.memory_phase.batch.micro_batch_rows, plan.memory_phase.plan
    length = plan.recipe.data.row_tokens if phase is None else phase.row_tokens
    which = f"; phase {phase.name}, which needs most" if phase is not None and len(plan.phases) > 1 else ""
    precision = plan.recipe.train.precision
    return f"Memory of a rank in GiB ({precision}, {rows} rows of {length} tokens{which}; * the recipe's)"


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
    each, optimizer = trained_checkpoint_bytes(plan.recipe), OPTIMIZERS[plan.recipe.optimizer.name]
    parameters = f"{plan.trained_parameters:,} parameters × {each} bytes"
    frozen = size - plan.trained_parameters * each
    states = f"{len(optimizer.states)} optimizer state{'' if len(optimizer.states) == 1 else 's'}"
    beside = f" + {gigabytes(frozen)} of frozen weights" if frozen else ""
    return [
        f"{parameters} (fp32 weights and {states}){beside} = {gigabytes(size)}",
        f"{keep} kept + 1 being written = {gigabytes((keep + 1) * size)}; one every {every:,} steps",
    ]
