"""A recipe on one device, whatever it was trained on: for replays and evaluations."""

from collections.abc import Iterator
from contextlib import contextmanager

from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import Task
from dstrain.train.main import build_task, prepare


@contextmanager
def alone(recipe: Recipe) -> Iterator[tuple[Runtime, Task]]:
    """A prepared run of a recipe on the one device of this process, with the weights that the recipe begins with."""
    runtime = Runtime.start(on_one_device(recipe))
    try:
        task = build_task(runtime.recipe, runtime)
        prepare(runtime, task)
        yield runtime, task
    finally:
        runtime.close()


def on_one_device(recipe: Recipe) -> Recipe:
    """The recipe for a single rank with whole gradients in reach: no ZeRO, no compilation, no process for the data."""
    train = recipe.train.model_copy(update={"zero": type(recipe.train.zero)(), "compile": False})
    changes: dict[str, object] = {"train": train}
    if isinstance(recipe, PretrainingRecipe):
        changes["data"] = recipe.data.model_copy(update={"prefetch_steps": 0})
    return recipe.model_copy(update=changes)
