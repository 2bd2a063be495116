"""Early stopping: which evaluation was the best, and whether it is time to stop waiting for a better one."""

import math
from typing import Any

from dstrain.errors import RecipeError
from dstrain.recipe.schema import EarlyStopping
from dstrain.train.state import TrainState

Best = dict[str, Any]  # {"step", "value", "since"}, as in a checkpoint's manifest


def chosen(rule: EarlyStopping | None, state: TrainState, metrics: dict[str, Any]) -> Best | None:
    """What is the best after an evaluation at the step of `state`; None where nothing is chosen by.

    Raises:
        RecipeError: the task has no such metric.
    """
    if rule is None:
        return None
    value = metrics.get(rule.metric)
    if isinstance(value, bool) or not isinstance(value, int | float):
        known = ", ".join(name for name, one in metrics.items() if isinstance(one, int | float))
        raise RecipeError(f"early_stopping.metric={rule.metric} is no metric of this task; use one of {known}")
    before = state.best
    if before is None:
        return {"step": state.step, "value": float(value), "since": 0} if math.isfinite(value) else None
    change = value - before["value"] if rule.direction == "maximize" else before["value"] - value
    if change > rule.least_change:  # never where one of them is NaN
        return {"step": state.step, "value": float(value), "since": 0}
    return before | {"since": before["since"] + 1}


def gave_up(rule: EarlyStopping | None, best: Best | None) -> bool:
    """Whether as many evaluations as the patience lasts have brought nothing better."""
    return rule is not None and rule.patience is not None and best is not None and best["since"] >= rule.patience
