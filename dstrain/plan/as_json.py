"""A plan's numbers as JSON: bytes, operations and counts."""

from dataclasses import asdict
from typing import Any

from dstrain.plan.batch import most_ranks
from dstrain.plan.memory import kept_checkpoints
from dstrain.plan.overview import STAGES, PhaseNumbers, Plan
from dstrain.plan.phase_text import block_sizes
from dstrain.recipe.schema import PretrainingRecipe


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's numbers as JSON: bytes, operations and counts."""
    recipe, total = plan.recipe, plan.total_parameters
    return {
        "name": recipe.name,
        "task": recipe.task,
        "world": plan.world,
        "most_ranks": most_ranks(recipe),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "phases": [_phase_json(plan, phase) for phase in plan.phases],
        "sources": _sources_json(plan),
        "notes": [] if plan.timeline is None else list(plan.timeline.notes),
        "parameters": plan.parameters | {"total": total, "trained": plan.trained_parameters},
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


def _phase_json(plan: Plan, phase: PhaseNumbers) -> dict[str, Any]:
    """Return a phase's numbers as JSON."""
    batch, flops = asdict(phase.batch) | {"used": phase.batch.used}, phase.flops
    numbers = {
        "batch": batch,
        "flops": {
            "forward_per_token": flops.forward,
            "model_per_token": flops.model,
            "executed_per_token": flops.executed,
            "model_per_step": flops.model * phase.batch.tokens,
            "executed_per_step": flops.executed * phase.batch.tokens,
        },
    }
    if phase.plan is None or plan.timeline is None:
        return numbers
    return {
        "name": phase.plan.name,
        "first_step": phase.plan.first_step,
        "steps": phase.plan.steps,
        "tokens": phase.plan.steps * phase.batch.tokens,
        "first_row": phase.plan.first_row,
        "sequence_length": phase.plan.sequence_length,
        "masking_rate": phase.plan.masking_rate,
        "learning_rate": phase.plan.learning_rate,
        "schedule": None if phase.plan.schedule is None else phase.plan.schedule.model_dump(mode="json"),
        "rope": dict(phase.plan.rope),
        "sources": dict(zip(plan.timeline.source_names, phase.plan.weights, strict=True)),
        **numbers,
    }


def _sources_json(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return each source's tokens, epochs, blocks and lanes as JSON; null where they are not known."""
    timeline = plan.timeline
    if timeline is None or not isinstance(plan.recipe, PretrainingRecipe):
        return {}
    return {
        name: {
            "tokens": timeline.source_tokens[number],
            "tokens_trained": timeline.source_tokens_before(number, timeline.total_steps),
            "epochs": timeline.epochs(number, timeline.total_steps),
        }
        | (block_sizes(plan.corpora[name], plan.recipe) if name in plan.corpora else {})
        for number, name in enumerate(timeline.source_names)
    }
