"""What a recipe will do on a number of ranks, by arithmetic alone: batch, FLOPs, memory, disk, DeepSpeed's config."""

from dstrain.plan.batch import BatchPlan, batch_plan, corpus_tokens, legal_world_sizes, masked_per_row, total_steps
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

__all__ = [
    "BatchPlan",
    "Flops",
    "Memory",
    "activation_bytes",
    "batch_plan",
    "checkpoint_bytes",
    "corpus_tokens",
    "deepspeed_config",
    "kept_checkpoints",
    "legal_world_sizes",
    "masked_per_row",
    "rank_memory",
    "recipe_checkpoint_bytes",
    "step_flops",
    "total_steps",
]
