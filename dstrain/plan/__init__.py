"""What a recipe will do on a number of ranks, by arithmetic alone: phases, batch, FLOPs, memory, disk, DeepSpeed."""

from dstrain.plan.batch import BatchPlan, batch_plan, masked_per_row, most_ranks, pairs_per_row
from dstrain.plan.corpus import corpus_tokens
from dstrain.plan.engine import deepspeed_config
from dstrain.plan.flops import Flops, step_flops
from dstrain.plan.memory import (
    Memory,
    activation_bytes,
    checkpoint_bytes,
    kept_checkpoints,
    rank_memory,
    recipe_checkpoint_bytes,
)
from dstrain.plan.phase_plan import PhasePlan, in_phase
from dstrain.plan.schedule import learning_rate, warmup_steps
from dstrain.plan.timeline import Timeline, make_timeline

__all__ = [
    "BatchPlan",
    "Flops",
    "Memory",
    "PhasePlan",
    "Timeline",
    "activation_bytes",
    "batch_plan",
    "checkpoint_bytes",
    "corpus_tokens",
    "deepspeed_config",
    "in_phase",
    "kept_checkpoints",
    "learning_rate",
    "make_timeline",
    "masked_per_row",
    "most_ranks",
    "pairs_per_row",
    "rank_memory",
    "recipe_checkpoint_bytes",
    "step_flops",
    "warmup_steps",
]
