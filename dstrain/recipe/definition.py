"""What `task: NAME` of a recipe stands for: its keys, what it measures, and where what trains and predicts is found.

A definition needs no torch: recipes are read, and plans made, in a third of a second. What does need it is named as
`module:Name` and imported when it is used.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from dstrain.base.registry import Registry
from dstrain.recipe.schema import CommonRecipe, ExampleRecipe, PretrainingRecipe

Direction = Literal["maximize", "minimize"]


class TaskDefinition(ABC):
    """A task. Its name is that of its file, or of its entry point, and the only word of its recipe's `task`."""

    recipe: ClassVar[type[CommonRecipe]]
    maximized: ClassVar[tuple[str, ...]] = ()  # what evaluations measure, the higher the better; some only of some data
    minimized: ClassVar[tuple[str, ...]] = ()  # the lower the better, beside `loss`

    @property
    def measures(self) -> dict[str, Direction]:
        """What evaluations measure, and which way is better; `loss` first."""
        loss: dict[str, Direction] = {"loss": "minimize"}
        return loss | dict.fromkeys(self.maximized, "maximize") | dict.fromkeys(self.minimized, "minimize")

    @abstractmethod
    def trained(self, recipe: Any) -> Any:
        """What trains a recipe: a subclass of `dstrain.tasks.task.Task`."""


class ObjectiveDefinition(TaskDefinition):
    """An objective of pretraining. What trains it is a subclass of `dstrain.tasks.pretraining.Pretraining`."""

    recipe: ClassVar[type[PretrainingRecipe]]


class ExampleTaskDefinition(TaskDefinition):
    """A task on labelled examples. What trains it is a subclass of `dstrain.tasks.example_task.ExampleTask`."""

    recipe: ClassVar[type[ExampleRecipe]]
    task_class: ClassVar[str | type]  # what trains it, or `module:Name` of it
    # What predicts, or `module:Name`: called on a `dstrain.predict.loaded.Loaded`, it returns a
    # `dstrain.predict.predictor.Predictor`. None: nothing does.
    predictor: ClassVar[str | type | None] = None
    auto_model: ClassVar[str | type]  # the class of Transformers, or `module:Name`, that loads what is exported
    model_classes: ClassVar[tuple[str, ...]]  # what the names of the models' classes end in
    is_default: ClassVar[bool] = False  # whether a folder that does not say its task is taken for this one's
    required_file: ClassVar[str | None] = None  # that a folder has to have
    writes_text: ClassVar[bool] = False  # whether texts are read as a model with a decoder reads them

    def trained(self, recipe: Any) -> Any:
        """See `TaskDefinition`."""
        return imported(self.task_class)

    @abstractmethod
    def outputs(self, recipe: Any) -> int | None:
        """How many outputs the head has; None where only the data tells."""


TASKS: Registry[ExampleTaskDefinition] = Registry(
    "task", ExampleTaskDefinition, "dstrain.tasks", "dstrain.recipe.tasks", separator="_"
)
OBJECTIVES: Registry[ObjectiveDefinition] = Registry(
    "objective", ObjectiveDefinition, "dstrain.objectives", "dstrain.recipe.objectives", separator="_"
)


def task_names() -> list[str]:
    """Everything that a recipe's `task` may be: objectives first."""
    return [*OBJECTIVES, *TASKS]


def definition_of(task: str) -> TaskDefinition:
    """The definition of a task or an objective that `task_names` has."""
    return OBJECTIVES[task] if task in OBJECTIVES else TASKS[task]


def definitions() -> Iterator[tuple[str, TaskDefinition]]:
    """All of them by name. Imports what other packages bring."""
    return ((name, definition_of(name)) for name in task_names())


def imported(reference: Any) -> Any:
    """What `module:Name` names; anything but a text is itself."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
