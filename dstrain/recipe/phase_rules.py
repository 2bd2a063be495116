"""Rules of sources and phases; and the other rules once more for each phase, with what it changes."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.architectures import installed_encoders
from dstrain.recipe.rules import Verdict, broken_rules, rule

_CARRIED = (  # what a phase changes for those after it too
    "model.global_rope_theta",
    "model.local_rope_theta",
    "model.max_position_embeddings",
)


@dataclass(frozen=True)
class _PhaseValues:
    """What holds in a phase.

    `known` has every valid value by the recipe's dotted keys, and what the phase says as `phase.steps` and the like;
    `own` names, for those that are not the recipe's, the key where they are written.
    """

    known: Mapping[str, Any]
    own: Mapping[str, str]


def broken_phase_rules(known: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """Yield `(keys, value, sentence)` for each rule that a phase breaks; the first key is to blame, and has `value`.

    Args:
        known: every valid value of the recipe by dotted key, as for `broken_rules`.
    """
    for phase in _phases(known):
        for keys, sentence in broken_rules(phase.known, phase.own):
            yield tuple(phase.own.get(key, key) for key in keys), phase.known[keys[0]], _named(sentence, phase.own)


def run_steps(known: Mapping[str, Any]) -> int | None:
    """Return the steps of the whole run, or None where they are not known or not valid."""
    phases = known.get("phases")
    if not phases:
        return _steps(known, known.get("train.steps"), known.get("train.tokens"))
    steps = [
        _steps(phase.known, phase.known.get("phase.steps"), phase.known.get("phase.tokens")) for phase in _phases(known)
    ]
    return sum(filter(None, steps)) if None not in steps and len(steps) == len(phases) else None


def _phases(known: Mapping[str, Any]) -> Iterator[_PhaseValues]:
    phases = known.get("phases")
    carried: dict[str, tuple[str, Any]] = {}
    for number in range(len(phases) if isinstance(phases, list) else 0):
        prefix = f"phases.{number}."
        said = {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
        if not said:
            continue  # no section at all
        own = {f"phase.{key}": f"{prefix}{key}" for key in said}
        values = dict(known) | {f"phase.{key}": value for key, value in said.items()} | {"phase.number": number}
        if said.get("schedule") is not None:
            values = {key: value for key, value in values.items() if not key.startswith("schedule.")}
        for key, value in said.items():
            of_recipe = "." in key and (key in known or key.startswith("schedule."))  # not `name`, which is another
            if of_recipe and value is not None and not isinstance(value, Mapping):
                values[key], own[key] = value, f"{prefix}{key}"
        carried |= {key: (f"{prefix}{key}", said[key]) for key in _CARRIED if said.get(key) is not None}
        for key, (place, value) in carried.items():
            values[key.replace("model.", "model.config.")] = value
            own[key.replace("model.", "model.config.")] = place
        if said.get("schedule") is not None:
            values["run.steps"] = _steps(values, said.get("steps"), said.get("tokens"))
            own["run.steps"] = f"phases.{number}"
        yield _PhaseValues(values, own)


def _steps(known: Mapping[str, Any], steps: int | None, tokens: int | None) -> int | None:
    if steps is not None or tokens is None:
        return steps
    keys = ("train.global_batch_rows", "data.sequence_length")
    return math.ceil(tokens / math.prod(known[key] for key in keys)) if all(key in known for key in keys) else None


def _named(sentence: str, own: Mapping[str, str]) -> str:
    """Return a sentence whose keys are named as where they are written."""
    for key, place in own.items():
        sentence = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.])", place, sentence)
    return sentence


# ---------------------------------------------------------------- sources


@rule("data.train", "data.sources")
def _one_kind_of_sources(train: str | None, sources: Mapping[str, Any] | None) -> Verdict:
    if train is None and sources is None:
        return "is missing; give a corpus, or several by name in data.sources"
    if train is not None and sources is not None:
        return "is given beside data.sources; set it to null and name the corpus in data.sources, or delete those"
    return None


@rule("data.sources", "phases")
def _sources_have_weight(sources: Mapping[str, Any] | None, phases: Any) -> Verdict:
    if sources is None:
        return None
    if not sources:
        return "names no source; write NAME: {shards: …, weight: …} below it"
    if not phases and not any(_weight(source) for source in sources.values()):
        return "have weights of 0 only; give one of them a weight, as in 1.0"
    return None


def _weight(source: Any) -> Any:
    """The weight of a source as it was written; 1 where it says none, or where it is no section."""
    return source["weight"] if isinstance(source, Mapping) and "weight" in source else 1.0


@rule("train.epochs", "data.sources")
def _epochs_are_of_one_source(epochs: float | None, sources: Mapping[str, Any] | None) -> Verdict:
    if epochs is not None and sources is not None and len(sources) > 1:
        return (
            f"is of which of the {len(sources)} data.sources? Each has its own epochs; set it to null, and give "
            "train.steps or train.tokens"
        )
    return None


# ---------------------------------------------------------------- phases


@rule("train.steps", "phases")
@rule("train.tokens", "phases")
@rule("train.epochs", "phases")
def _phases_are_the_length(length: float | None, phases: Any) -> Verdict:
    if length is not None and phases:
        return "is given beside phases, whose sum is the run's length; set it to null, or phases to []"
    return None


@rule("phase.steps", "phase.tokens")
def _one_length_of_a_phase(steps: int | None, tokens: int | None) -> Verdict:
    if steps is None and tokens is None:
        return "and phase.tokens are both missing; give one of them"
    if steps is not None and tokens is not None:
        return f"is given beside phase.tokens={tokens}; keep one of them"
    return None


@rule("phase.name", "phase.number", "phases")
def _names_differ(name: str | None, number: int, phases: Any) -> Verdict:
    names = [phase["name"] if isinstance(phase, Mapping) and "name" in phase else None for phase in phases]
    if name is not None and name in names[:number]:
        return f"is the name of phases.{names.index(name)} too; give it another name"
    return None


@rule("phase.data.sources", "data.sources")
def _weights_are_of_sources(weights: Mapping[str, float] | None, sources: Mapping[str, Any] | None) -> Verdict:
    if weights is None:
        if sources and not any(_weight(source) for source in sources.values()):
            return "is missing, and all weights of data.sources are 0; give weights, as in {NAME: 1.0}"
        return None
    if sources is None:
        return "gives weights, and there are no data.sources to have them; name the corpora there, or delete it"
    unknown = next((name for name in weights if name not in sources), None)
    if unknown is not None:
        return f"names {unknown}, and data.sources has {', '.join(sources)}; use one of them, or add it there"
    if not any(weights.values()):
        return "has no weight above 0; give one of them a weight, as in 1.0"
    return None


@rule("phase.model", "model.architecture")
def _positions_are_rotary(model: Mapping[str, Any], architecture: str) -> Verdict:
    changed = isinstance(model, Mapping) and any(value is not None for value in model.values())
    encoders = installed_encoders()
    if changed and not (architecture in encoders and encoders[architecture].rotary_bases):
        rotary = " or ".join(name for name, known in encoders.items() if known.rotary_bases)
        return f"changes rotary positions, and {architecture} has none; delete it, or use model.architecture={rotary}"
    return None
