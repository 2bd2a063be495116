"""DeepSpeed's whole configuration, from a recipe and a number of ranks. Every number is concrete, nothing `auto`."""

from typing import Any

from dstrain.plan.batch import batch_plan
from dstrain.plan.timeline import PhasePlan
from dstrain.recipe.schema import Recipe
from dstrain.recipe.training import Zero

BUCKET_ELEMENTS = 50_000_000  # gradients reduced, or weights gathered, in one collective
LIVE_ELEMENTS = 100_000_000  # stage 3: weights gathered at any one time
PREFETCH_ELEMENTS = 20_000_000
PERSISTENT_ELEMENTS = 100_000  # stage 3: smaller parameters stay whole on every rank
NEVER_STEPS = 2**31 - 1


def deepspeed_config(recipe: Recipe, world_size: int, phase: PhasePlan | None = None) -> dict[str, Any]:
    """Return the configuration to initialise DeepSpeed with.

    Its batch is nominal: DeepSpeed wants ranks × micro-batches × rows to be the whole of it, and takes nothing from it
    but when a step is complete. Rows that a rank has fewer of than others are in it; the loss leaves them out.

    Args:
        recipe: what to train.
        world_size: number of ranks.
        phase: whose batch; None takes what the recipe says outside its phases.

    Raises:
        RecipeError: there are more ranks than can train the recipe.
    """
    batch = batch_plan(recipe, world_size, phase)
    train = recipe.train
    return {
        "train_batch_size": batch.world * batch.micro_batch_rows * batch.accumulation,
        "train_micro_batch_size_per_gpu": batch.micro_batch_rows,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 0.0 if clips_itself(recipe) else (train.clip_grad_norm or 0.0),
        # A step whose gradients are not finite is not applied, and says so.
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "zero_optimization": _zero(train.zero),
        "zero_allow_untested_optimizer": True,  # torch.optim's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER_STEPS,
        "wall_clock_breakdown": False,
    }


def clips_itself(recipe: Recipe) -> bool:
    """Whether our optimizer clips: in fp32 without ZeRO, DeepSpeed neither reports the gradient norm nor checks it."""
    return recipe.train.zero.stage == 0 and recipe.train.precision == "fp32"


def _zero(zero: Zero) -> dict[str, Any]:
    config: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 0:
        return config
    config |= {
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if zero.stage == 3:
        config |= {
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    if zero.offload_optimizer != "none":
        config["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": False}
    if zero.offload_params != "none":
        config["offload_param"] = {"device": zero.offload_params, "pin_memory": False}
    return config
