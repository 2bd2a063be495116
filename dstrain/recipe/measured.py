"""What evaluations of each task measure: so a metric that there is not is found before anything is trained."""

from dstrain.recipe.definition import OBJECTIVES, definition_of


def not_measured(metric: str, task: str) -> str | None:
    """What is wrong with the name of a metric; None where evaluations of the task may have it.

    Whether there is a source of the name behind a dot is not asked here.
    """
    known = definition_of(task).measures
    name, dot, _ = metric.removeprefix("valid_").partition(".")
    if name in known and (task in OBJECTIVES or not dot):
        return None
    return f"is nothing that evaluations of {task} measure; use one of {', '.join(known)}"
