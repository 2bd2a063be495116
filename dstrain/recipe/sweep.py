"""The `sweep:` section: which keys of the recipe are searched, in which ranges, towards what. `dstrain run` ignores it.

sweep:
  metric: accuracy                 # of the evaluations, as `dstrain report` names it
  direction: maximize
  trials: 20
  parameters:
    optimizer.learning_rate: {low: 1e-5, high: 1e-3, log: true}
    train.global_batch_rows: {choices: [16, 32]}
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from dstrain.base.section import NonNegativeInt, PositiveInt, Section
from dstrain.recipe.measured import not_measured
from dstrain.recipe.messages import given, nearest, unknown_key, wrong_value
from dstrain.recipe.metrics import Metric
from dstrain.recipe.source import Node, Place, Problem

Value = str | bool | int | float


class SearchedKey(Section):
    """The values that a key may take, or several keys together, as in `train.seed, data.seed`.

    From `low` to `high` (both whole numbers: whole numbers), or `choices`.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Value, ...] | None = None


class Sweep(Section):
    """A search with Optuna (Akiba et al. 2019)."""

    metric: Metric
    direction: Literal["minimize", "maximize"]
    trials: PositiveInt
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "median"
    seed: NonNegativeInt = 0
    parameters: dict[str, SearchedKey] = Field(min_length=1)


def read_sweep(node: Node) -> tuple[Sweep | None, list[Problem]]:
    """The section from its place in the file; None where something is wrong with it. The keys are not looked up yet."""
    if not isinstance(node.value, dict):
        return None, [Problem(node.place, f"sweep={given(node)} must be a section; write its keys below it, indented")]
    problems: list[Problem] = []
    sweep: Sweep | None = None
    try:
        sweep = Sweep.model_validate_json(json.dumps(node.plain()))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            problems.append(_type_problem(node, details["loc"], details))
    if sweep is not None:
        for key, searched in sweep.parameters.items():
            problems += [
                Problem(place_of(node, key), f"sweep.parameters.{key} {sentence}")
                for sentence in _rule_problems(sweep, searched)
            ]
    return (None if problems else sweep), list(dict.fromkeys(problems))


def unmeasured(node: Node, sweep: Sweep, task: str) -> list[Problem]:
    """What is wrong with the metric of a sweep of a task's recipe. `node`: the section in its file."""
    sentence = not_measured(sweep.metric, task)
    return [Problem(_find(node, ("metric",))[1], f"sweep.metric={sweep.metric} {sentence}")] if sentence else []


CHANCE = ("train.seed", "data.seed", "data.fold")  # keys that make a run another one, but no better


def is_chance(parameter: str) -> bool:
    """Whether a parameter is nothing but chance: seeds, and what is held out."""
    return all(key in CHANCE for key in keys_of(parameter))


def keys_of(parameter: str) -> list[str]:
    """The keys that a parameter of a sweep sets."""
    return [key.strip() for key in parameter.split(",")]


def assignments(values: Mapping[str, Value]) -> list[str]:
    """A trial's values as `dstrain run` takes them."""
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for parameter, value in values.items()
        for key in keys_of(parameter)
    ]


def place_of(sweep: Node, key: str) -> Place:
    """Where a searched key was written."""
    return _find(sweep, ("parameters", key))[1]


def values_to_try(searched: SearchedKey) -> list[Value]:
    """Values that are legal if all are: the ends of a range, or every choice."""
    if searched.choices is not None:
        return list(searched.choices)
    return [value for value in (searched.low, searched.high) if value is not None]


def _rule_problems(sweep: Sweep, searched: SearchedKey) -> Iterator[str]:
    low, high = searched.low, searched.high
    if searched.choices is not None:
        if (low, high, searched.log) != (None, None, False):
            yield "has choices and a range; keep one of them"
        elif len({json.dumps(choice) for choice in searched.choices}) < max(2, len(searched.choices)):
            yield "needs two different choices at least; write [a, b, …]"
        return
    if low is None or high is None:
        yield "has neither both ends of a range nor choices; write {low: …, high: …} or {choices: [a, b]}"
    elif not low < high:
        yield f"goes from {low} to {high}; low must be less than high"
    elif searched.log and low <= 0:
        yield f"begins at {low}, and a logarithm needs more than 0; raise low or leave out log"
    elif sweep.sampler == "grid":
        yield "is a range, and a grid needs choices; write {choices: [a, b]}, or sampler: tpe"


def _type_problem(sweep: Node, location: tuple[int | str, ...], details: Any) -> Problem:
    known = {"int", "float", "str", "bool", "constrained-str"}
    steps = [step for step in location if isinstance(step, str) and step not in known]
    path = ".".join(["sweep", *steps])
    node, place = _find(sweep, tuple(steps))
    if node is None:
        return Problem(place, f"{path} is missing; add it")
    if details["type"] == "extra_forbidden":
        fields = Sweep.model_fields if len(steps) == 1 else SearchedKey.model_fields
        close = nearest(steps[-1], fields)
        return Problem(node.place, unknown_key(path, fields, [f"{path.rpartition('.')[0]}.{close}"] if close else []))
    if details["type"] in ("too_short", "dict_type", "model_type"):
        remedy = "name at least one key" if details["type"] == "too_short" else "write its keys below it, indented"
        return Problem(node.place, f"{path}={given(node)} must be a section; {remedy}")
    if details["type"].startswith(("int_", "float_")) and steps[-1] in ("low", "high"):
        return Problem(node.place, f"{path}={given(node)} must be a number; write digits, as in 3e-4")
    if steps[-1] == "choices" and len(location) > len(steps):
        return Problem(node.place, f"{path}={given(node)} must be a list of plain values; write [a, b, …]")
    return Problem(node.place, wrong_value(path, node, details))


def _find(sweep: Node, steps: tuple[str, ...]) -> tuple[Node | None, Place]:
    here = sweep
    for step in steps:
        found = here.value.get(step) if isinstance(here.value, dict) else None
        if found is None:
            return None, here.place
        here = found
    return here, here.place
