"""What fixes the rows of a run: contents and numbers, never a path or a name. Imports no torch.

    recipe, timeline, digests ──► identity: JSON, in every manifest
    identity of a checkpoint, identity now, the data steps done ──► differences (typed; put into words by who refuses)

What fixes a run is every row up to its newest checkpoint. So a phase that has begun must be as it was, except that the
one under way may become longer or shorter, as long as it covers the data steps that were done. A phase that has not
begun may be anything.

    {"law": 2, "task": "masked_lm", "tokenizer": digest,
     "data": {"lanes", "seed", "shuffle_window", "masking": {"unit", "replace"}, "pairs": {…}, "on_bad_sample"},
     "phases": [{"name", "first_step", "steps", "global_batch_rows", "sequence_length", "masking_rate": [first, last],
                 "sources": {NAME: {"digest", "tokens", "weight"}}, "model": {…}}]}

Tasks on examples have no phases: theirs is compared key by key, and has `global_batch_rows`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol, Self

from dstrain.recipe.difference import Difference

if TYPE_CHECKING:  # manifests are read without pydantic
    from dstrain.plan.timeline import Timeline
    from dstrain.recipe.schema import PretrainingRecipe

LAW = 2  # of the data: how rows follow from contents and numbers
Identity = dict[str, Any]  # JSON
_RECIPE_KEYS = {"global_batch_rows": "train.global_batch_rows", "corpus": "data.train"}
_SINGLE_SOURCE = "train"  # the name that a recipe gives to `data.train`


class Content(Protocol):
    """A source by what it holds: a `Corpus`."""

    @property
    def digest(self) -> str:
        """Of its documents, whatever their shards are called and wherever they lie."""

    @property
    def total_tokens(self) -> int:
        """All of one epoch."""


@dataclass(frozen=True)
class SourceContent:
    """The same, remembered."""

    digest: str
    total_tokens: int


def stream_identity(
    recipe: "PretrainingRecipe", timeline: "Timeline", contents: Mapping[str, Content], tokenizer: str
) -> Identity:
    """The identity of a masked-LM run.

    Args:
        recipe: of the run.
        timeline: its phases.
        contents: its sources, by their names in the recipe.
        tokenizer: the tokenizer's digest.
    """
    data = recipe.data
    phases = [
        {
            "name": phase.name,
            "first_step": phase.first_step,
            "steps": phase.steps,
            "global_batch_rows": phase.global_batch_rows,
            "sequence_length": phase.sequence_length,
            "masking_rate": list(phase.masking_rate),
            "sources": {
                name: {"digest": contents[name].digest, "tokens": contents[name].total_tokens, "weight": weight}
                for name, weight in zip(timeline.source_names, phase.weights, strict=True)
                if weight
            },
            "model": dict(phase.rope),
        }
        for phase in timeline.phases
    ]
    return {
        "law": LAW,
        "task": recipe.task,
        "tokenizer": tokenizer,
        "data": {
            "lanes": timeline.lanes,
            "seed": data.seed,
            "shuffle_window": data.shuffle_window,
            "masking": {"unit": data.masking.unit, "replace": list(data.masking.replace)},
            "pairs": data.pairs.model_dump(mode="json") if data.pairs.objective != "none" else {"objective": "none"},
            "on_bad_sample": data.on_bad_sample,
        },
        "phases": phases,
    }


def contents_of(identity: Identity) -> dict[str, SourceContent]:
    """The sources of an identity by name."""
    return {
        name: SourceContent(about["digest"], about["tokens"])
        for phase in identity.get("phases", [])
        for name, about in phase["sources"].items()
    }


# ---------------------------------------------------------------- how many rows


class GlobalBatches:
    """The rows of every global batch.

    Args:
        identity: of the data.
        origin: the data step and the row with which it began.
    """

    def __init__(self, identity: Identity, origin: tuple[int, int] = (0, 0)) -> None:
        self.origin = origin
        first_step, row = origin
        phases = _phases(identity) if "phases" in identity else [_only_phase(identity)]
        self._begun: list[tuple[int, int, int]] = []  # of each phase: its first data step, first row, rows of a batch
        for phase in phases:
            if phase.end > first_step:
                begins = max(phase.first_step, first_step)
                self._begun.append((begins, row, phase.global_batch_rows))
                row += 0 if math.isinf(phase.end) else int(phase.end - begins) * phase.global_batch_rows

    def first_row(self, data_step: int) -> int:
        """The number of a global batch's first row: how many rows there are in all before it."""
        first_step, row, rows = next(
            (phase for phase in reversed(self._begun) if phase[0] <= data_step), self._begun[0]
        )
        return row + (data_step - first_step) * rows

    def step_of(self, row: int) -> int:
        """The global batch that a row is in."""
        first_step, first_row, rows = next(
            (phase for phase in reversed(self._begun) if phase[1] <= row), self._begun[0]
        )
        return first_step + (row - first_row) // rows


# ---------------------------------------------------------------- what differs


def differences(saved: Identity, now: Identity, first_step: int, data_step: int) -> list[Difference]:
    """In what the rows of the data steps `first_step` to `data_step` - 1 would be other ones, or of another task.

    Args:
        saved: the identity of a checkpoint.
        now: that of the recipe and the data which it would be resumed with.
        first_step: the data step with which the checkpoint's data began.
        data_step: how many data steps were done.

    Returns:
        Differences in the order of the run; empty where `now` can go on with what `saved` began.
    """
    before, after = _flat(saved), _flat(now)
    keys = [*before, *(key for key in after if key not in before)]
    found = [
        Difference(_RECIPE_KEYS.get(key, key), before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    ]
    begun = [_begun(identity, first_step, data_step) for identity in (saved, now)]
    only_phases = all(len(identity.get("phases", [])) <= 1 for identity in (saved, now))
    for old, new in zip_longest(*begun):
        if old is None or new is None:  # the one before it has another length
            break
        where = "" if only_phases else old.words
        done, covered = (int(min(phase.end, data_step)) - max(phase.first_step, first_step) for phase in (old, new))
        if done != covered:
            lengths = (old.steps, new.steps) if old.steps != new.steps else (done, covered)  # data goes on in the last
            found.append(Difference("steps" if where else "train.steps", *lengths, where))
            break
        found += [Difference(key, *values, where) for key, values in _changed_keys(old, new)]
        found += [Difference(key, *values, where) for key, values in _changed_sources(old.sources, new.sources)]
    return found


@dataclass(frozen=True)
class _Source:
    """What a phase takes of a source."""

    name: str
    digest: str
    tokens: int  # of texts, as they were counted
    weight: float

    @property
    def content(self) -> tuple[str, int]:
        """What tells its rows from those of another source."""
        return self.digest, self.tokens


@dataclass(frozen=True)
class _Phase:
    """A phase of an identity. The last one has no end: data goes on in it."""

    number: int  # from 1
    name: str | None
    first_step: int
    steps: int | None
    end: float  # the data step after its last one
    global_batch_rows: int
    sequence_length: int
    masking_rate: tuple[float, float]  # of its first and its last step
    sources: tuple[_Source, ...]  # in their order, which decides which rows are theirs
    model: Mapping[str, float]

    @classmethod
    def of(cls, number: int, phase: dict[str, Any], *, is_last: bool) -> Self:
        sources = (
            _Source(name, about["digest"], about["tokens"], about["weight"]) for name, about in phase["sources"].items()
        )
        first_rate, last_rate = phase["masking_rate"]
        return cls(
            number=number,
            name=phase["name"],
            first_step=phase["first_step"],
            steps=phase["steps"],
            end=math.inf if is_last or phase["steps"] is None else phase["first_step"] + phase["steps"],
            global_batch_rows=phase["global_batch_rows"],
            sequence_length=phase["sequence_length"],
            masking_rate=(first_rate, last_rate),
            sources=tuple(source for source in sources if source.weight),
            model=phase["model"],
        )

    @property
    def words(self) -> str:
        """As `phase 2 (long)`."""
        number = f"phase {self.number}"
        return number if self.name in (None, number) else f"{number} ({self.name})"

    @property
    def masking(self) -> dict[str, Any] | float:
        """What decides the rate of every step: a number; of one that changes, over how many steps it does."""
        first, last = self.masking_rate
        return first if first == last else {"from": first, "to": last, "steps": self.steps}


def _phases(identity: Identity) -> list[_Phase]:
    phases = identity["phases"]
    return [_Phase.of(n, phase, is_last=n == len(phases)) for n, phase in enumerate(phases, start=1)]


def _only_phase(identity: Identity) -> _Phase:
    return _Phase(1, None, 0, None, math.inf, identity["global_batch_rows"], 0, (0, 0), (), {})


def _begun(identity: Identity, first_step: int, data_step: int) -> list[_Phase]:
    """The phases that some of these data steps are of."""
    phases = _phases(identity) if "phases" in identity else []
    return [phase for phase in phases if phase.first_step < data_step and phase.end > first_step < data_step]


def _changed_keys(old: _Phase, new: _Phase) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Recipe keys, with the values before and after."""
    for key, before, after in (
        ("train.global_batch_rows", old.global_batch_rows, new.global_batch_rows),
        ("data.sequence_length", old.sequence_length, new.sequence_length),
        ("data.masking.rate", old.masking, new.masking),
    ):
        if before != after:
            yield key, (before, after)
    for name in [*old.model, *(name for name in new.model if name not in old.model)]:
        if old.model.get(name) != new.model.get(name):
            yield f"model.{name}", (old.model.get(name), new.model.get(name))


def _changed_sources(old: tuple[_Source, ...], new: tuple[_Source, ...]) -> list[tuple[str, tuple[Any, Any]]]:
    """The same of sources, which are known by what they hold, whatever their names."""
    if [(source.content, source.weight) for source in old] == [(source.content, source.weight) for source in new]:
        return []
    by_content, by_name = {source.content: source for source in new}, {source.name: source for source in new}
    known = {source.content for source in old}
    changed: list[tuple[str, tuple[Any, Any]]] = []
    for source in old:
        same, namesake = by_content.get(source.content), by_name.get(source.name)
        if same is not None:
            if same.weight != source.weight:
                changed.append((f"data.sources.{source.name}.weight", (source.weight, same.weight)))
        elif namesake is not None and namesake.content not in known:
            known.add(namesake.content)
            is_only = source.name == _SINGLE_SOURCE and len(old) == 1
            key = "data.train" if is_only else f"data.sources.{source.name}"
            recounted = source.digest == namesake.digest  # texts, by other tokenizer code
            before, after = (f"{one.tokens:,} tokens" if recounted else one.digest for one in (source, namesake))
            changed.append((key, (before, after)))
        else:
            changed.append((f"data.sources.{source.name}.weight", (source.weight, 0)))
    changed += [
        (f"data.sources.{source.name}.weight", (0, source.weight)) for source in new if source.content not in known
    ]
    # The same sources with the same weights are left: it is their order that has changed, and with it whose a row is.
    return changed or [("data.sources", ([source.name for source in old], [source.name for source in new]))]


def _flat(identity: Identity, prefix: str = "") -> dict[str, Any]:
    """All values by dotted key, but for the phases."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif prefix or key != "phases":
            flat[f"{prefix}{key}"] = value
    return flat
