"""Learning-rate schedules: pure functions of the recipe and the step."""

import math
from collections.abc import Mapping
from typing import Any

from dstrain.plan.timeline import Timeline
from dstrain.recipe.schema import Recipe
from dstrain.recipe.training import Schedule


def learning_rate(recipe: Recipe, timeline: Timeline, step: int, plateau: Mapping[str, Any] | None = None) -> float:
    """Learning rate used by a global step, from 0.

    It is that of the phase: the phase's own schedule, counted from its first step to its last, or the recipe's, counted
    over the whole run; times the phase's highest rate.

    Args:
        recipe: gives the schedule of phases that have none of their own.
        timeline: the run's course.
        step: global step; beyond the last one the rate is what it came to.
        plateau: what the evaluations before this step came to, see `best.plateaued`; None where there was none.
    """
    phase = timeline.phase_at(step)
    schedule = recipe.schedule if phase.schedule is None else phase.schedule
    reductions = plateau["reductions"] if plateau else 0
    share = rate_share(schedule, step - phase.schedule_first_step, phase.schedule_steps, reductions)
    return phase.learning_rate * share


def rate_share(schedule: Schedule, step: int, steps: int, reductions: int = 0) -> float:
    """The share of the highest learning rate that a schedule over so many steps gives to one of them, from 0.

    The warm-up is a straight line that reaches 1 at its last step. See `Schedule` for what comes after it.

    Args:
        schedule: the recipe's or a phase's.
        step: from the schedule's first.
        steps: that it is counted over.
        reductions: how often `plateau` has lowered the rate.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.plateau is not None:
        return float(max(schedule.min_lr_ratio, schedule.plateau.factor**reductions))
    if schedule.name == "inverse_sqrt":
        return max(schedule.min_lr_ratio, math.sqrt(max(warmup, 1) / (step + 1)))
    start = warmup
    if schedule.name == "warmup_stable_decay":
        start = max(warmup, steps - round(schedule.decay_fraction * steps))
    passed = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * _share_left(schedule, passed)


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Number of steps over which the learning rate rises from 0, of so many that the schedule is counted over."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return round((schedule.warmup_fraction or 0.0) * steps)


def _share_left(schedule: Schedule, passed: float) -> float:
    """From 1 down to 0 over the share of the steps that has passed, but for what stays."""
    match schedule.name:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * passed))
        case "cosine_restarts":
            cycle = 1.0 if passed == 1 else passed * (schedule.restarts + 1) % 1
            return 0.5 * (1 + math.cos(math.pi * cycle))
        case "polynomial":
            return float((1 - passed) ** schedule.power)
        case "one_minus_sqrt":
            return 1 - math.sqrt(passed)
        case _:  # linear, and the decay of warmup_stable_decay
            return 1 - passed
