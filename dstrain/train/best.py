"""Early stopping and plateaus: which evaluation was the best, and whether a better one has been waited for enough."""

import math
from typing import Any

from dstrain.errors import RecipeError
from dstrain.recipe.training import EarlyStopping, Plateau

Best = dict[str, Any]  # {"step", "value", "since"}, as in a checkpoint's manifest


def chosen(rule: EarlyStopping | None, before: Best | None, step: int, metrics: dict[str, Any]) -> Best | None:
    """What is the best after an evaluation at a step; None where nothing is chosen by.

    Raises:
        RecipeError: the task has no such metric.
    """
    return None if rule is None else _judged(rule, "early_stopping", before, step, metrics)


def plateaued(rule: Plateau | None, before: Best | None, step: int, metrics: dict[str, Any]) -> Best | None:
    """The same for the learning rate: the best with its `reductions` so far, after one of which `since` begins anew.

    Raises:
        RecipeError: the task has no such metric.
    """
    best = None if rule is None else _judged(rule, "schedule.plateau", before, step, metrics)
    if rule is None or best is None:
        return None
    reductions = before["reductions"] if before is not None else 0
    if best["since"] >= rule.patience:
        return best | {"since": 0, "reductions": reductions + 1}
    return best | {"reductions": reductions}


def _judged(
    rule: EarlyStopping | Plateau, key: str, before: Best | None, step: int, metrics: dict[str, Any]
) -> Best | None:
    value = metrics.get(rule.metric)
    if isinstance(value, bool) or not isinstance(value, int | float):
        known = ", ".join(name for name, one in metrics.items() if isinstance(one, int | float))
        raise RecipeError(f"{key}.metric={rule.metric} is not measured on this data; use one of {known}")
    if before is None or before["value"] is None:
        return {"step": step, "value": float(value), "since": 0} if math.isfinite(value) else before
    change = value - before["value"] if rule.direction == "maximize" else before["value"] - value
    if change > rule.min_delta:  # never where one of them is NaN
        return {"step": step, "value": float(value), "since": 0}
    return before | {"since": before["since"] + 1}


def gave_up(rule: EarlyStopping | None, best: Best | None) -> bool:
    """Whether as many evaluations as the patience lasts have brought nothing better."""
    return rule is not None and rule.patience is not None and best is not None and best["since"] >= rule.patience
