"""What fixes the rows of a run: contents and numbers of what has begun, and nothing else."""

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.checkpoint.identity import GlobalBatches, Identity, contents_of, differences
from dstrain.recipe.difference import Difference, shown

WEB, CODE, BOOKS = ("a" * 64, "b" * 64, "c" * 64)


@dataclass(frozen=True)
class PhaseSketch:
    """A phase of an identity, without its first step."""

    steps: int
    sources: tuple[tuple[str, str, float], ...] = (("web", WEB, 1.0),)
    rows: int = 8
    length: int = 32
    rate: tuple[float, float] = (0.15, 0.15)
    name: str | None = None
    theta: float | None = None


def identity(*phases: PhaseSketch, **data: object) -> Identity:
    first_steps = [sum(phase.steps for phase in phases[:number]) for number in range(len(phases))]
    return {
        "law": 2,
        "task": "masked_lm",
        "tokenizer": "d" * 64,
        "data": {"lanes": 8, "seed": 1, "masking": {"unit": "token"}} | data,
        "phases": [
            {
                "name": phase.name or f"phase {number}",
                "first_step": first_step,
                "steps": phase.steps,
                "global_batch_rows": phase.rows,
                "sequence_length": phase.length,
                "masking_rate": list(phase.rate),
                "sources": {
                    name: {"digest": digest, "tokens": 1000, "weight": weight} for name, digest, weight in phase.sources
                },
                "model": {} if phase.theta is None else {"global_rope_theta": phase.theta},
            }
            for number, (first_step, phase) in enumerate(zip(first_steps, phases, strict=True), start=1)
        ],
    }


SHORT = PhaseSketch(10, name="short")
LONG = PhaseSketch(10, rows=16, length=64, name="long")
MIXED = PhaseSketch(20, (("web", WEB, 0.7), ("code", CODE, 0.3)), name="mixed")
RUN = identity(SHORT, LONG, MIXED)


def words(saved: Identity, now: Identity, data_step: int, first_step: int = 0) -> list[str]:
    return [str(difference) for difference in differences(saved, now, first_step, data_step)]


# ------------------------------------------------------------------ what may change, and what may not


def test_the_same_is_the_same_whatever_sources_are_called() -> None:
    assert words(RUN, RUN, 40) == []
    renamed = replace(MIXED, sources=(("crawl", WEB, 0.7), ("github", CODE, 0.3)))
    assert words(RUN, identity(SHORT, LONG, renamed), 40) == []


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (replace(LONG, length=128), "phase 2 (long): data.sequence_length: 64 → 128"),
        (replace(LONG, rows=8), "phase 2 (long): train.global_batch_rows: 16 → 8"),
        (replace(LONG, rate=(0.3, 0.3)), "phase 2 (long): data.masking.rate: 0.15 → 0.3"),
        (replace(LONG, theta=160000.0), "phase 2 (long): model.global_rope_theta: null → 160000"),
        (
            replace(LONG, rate=(0.3, 0.1)),
            'phase 2 (long): data.masking.rate: 0.15 → {"from": 0.3, "to": 0.1, "steps": 10}',
        ),
        (
            replace(LONG, sources=(("web", BOOKS, 1.0),)),
            "phase 2 (long): data.sources.web: aaaaaaaaaaaa… → cccccccccccc…",
        ),
        (
            replace(LONG, sources=(("books", BOOKS, 1.0),)),
            "phase 2 (long): data.sources.web.weight: 1 → 0",
        ),
    ],
)
def test_a_phase_that_has_begun_is_refused_by_number_name_and_key_and_one_that_has_not_may_change(
    changed: PhaseSketch, difference: str
) -> None:
    now = identity(SHORT, changed, MIXED)
    assert words(RUN, now, 10) == []
    assert words(RUN, now, 11)[0] == difference
    assert words(RUN, now, 40)[0] == difference


def test_sources_are_added_and_reweighted_from_a_phase_on_that_has_not_begun() -> None:
    more = replace(MIXED, sources=(("web", WEB, 0.5), ("code", CODE, 0.3), ("books", BOOKS, 0.2)))
    now = identity(SHORT, LONG, more)
    assert words(RUN, now, 20) == []
    assert words(RUN, now, 21) == [
        "phase 3 (mixed): data.sources.web.weight: 0.7 → 0.5",
        "phase 3 (mixed): data.sources.books.weight: 0 → 0.2",
    ]
    swapped = replace(MIXED, sources=(("code", CODE, 0.3), ("web", WEB, 0.7)))
    assert words(RUN, identity(SHORT, LONG, swapped), 21) == [
        'phase 3 (mixed): data.sources: ["web", "code"] → ["code", "web"]'
    ]


def test_the_phase_under_way_may_become_longer_or_shorter_as_long_as_it_covers_what_was_done() -> None:
    for steps in (5, 10, 99):
        assert words(RUN, identity(SHORT, replace(LONG, steps=steps), MIXED), 15) == []
    assert words(RUN, identity(SHORT, replace(LONG, steps=4), MIXED), 15) == ["phase 2 (long): steps: 10 → 4"]
    assert words(RUN, identity(SHORT, replace(LONG, steps=11), MIXED), 21) == ["phase 2 (long): steps: 10 → 11"]
    assert words(RUN, identity(SHORT, LONG), 15) == []
    assert words(RUN, identity(SHORT, LONG), 21) == ["phase 2 (long): steps: 10 → 11"], "the last one has no end"


def test_data_steps_beyond_the_end_are_of_the_last_phase() -> None:
    run = identity(SHORT)  # with rollbacks it has consumed 12 batches for its 10 steps
    assert words(run, identity(replace(SHORT, steps=99)), 12) == []
    assert words(run, identity(replace(SHORT, steps=12), LONG), 12) == []
    assert words(run, identity(SHORT, LONG), 12) == ["phase 1 (short): steps: 12 → 10"]


def test_a_rate_that_goes_from_one_to_another_is_fixed_by_the_number_of_steps() -> None:
    falling = PhaseSketch(10, rate=(0.3, 0.1))
    assert words(identity(falling), identity(replace(falling, steps=20)), 5) == [
        'data.masking.rate: {"from": 0.3, "to": 0.1, "steps": 10} → {"from": 0.3, "to": 0.1, "steps": 20}'
    ]
    assert words(identity(falling), identity(replace(falling, steps=20)), 0) == []


def test_without_phases_keys_are_those_of_the_recipe() -> None:
    train = PhaseSketch(10, (("train", WEB, 1.0),))
    other = replace(train, sources=(("train", CODE, 1.0),), rows=16)
    assert words(identity(train), identity(other), 5) == [
        "train.global_batch_rows: 8 → 16",
        "data.train: aaaaaaaaaaaa… → bbbbbbbbbbbb…",
    ]


def test_texts_that_were_counted_otherwise_are_other_data() -> None:
    """The same texts by the same tokenizer, but another release of its library."""
    train = identity(PhaseSketch(10, (("train", WEB, 1.0),)))
    recounted = identity(PhaseSketch(10, (("train", WEB, 1.0),)))
    recounted["phases"][0]["sources"]["train"]["tokens"] = 1001
    assert words(train, recounted, 5) == ["data.train: 1,000 tokens → 1,001 tokens"]


def test_what_holds_for_the_whole_run_is_refused_by_its_key() -> None:
    now = identity(SHORT, LONG, MIXED, seed=2, lanes=4) | {"tokenizer": "e" * 64}
    assert words(RUN, now, 1) == [
        "tokenizer: dddddddddddd… → eeeeeeeeeeee…",
        "data.lanes: 8 → 4 (write data.lanes: 8)",
        "data.seed: 1 → 2",
    ]


def test_after_a_change_of_data_nothing_before_it_is_compared() -> None:
    now = identity(replace(SHORT, length=16), LONG, MIXED)
    assert words(RUN, now, 15, first_step=10) == []
    assert words(RUN, now, 15, first_step=9) == ["phase 1 (short): data.sequence_length: 32 → 16"]
    assert words(RUN, now, 9, first_step=9) == [], "not a step was done"


def test_tasks_on_examples_are_compared_key_by_key() -> None:
    saved = {"task": "ranking", "corpus": WEB, "labels": ["a"], "global_batch_rows": 8, "data": {"seed": 1}}
    assert words(saved, saved, 5) == []
    assert words(saved, saved | {"corpus": CODE, "global_batch_rows": 4, "labels": ["b"]}, 5) == [
        "data.train: aaaaaaaaaaaa… → bbbbbbbbbbbb…",
        'labels: ["a"] → ["b"]',
        "train.global_batch_rows: 8 → 4",
    ]


def test_a_difference_says_whether_it_is_one_of_data_and_survives_json() -> None:
    of_data = [Difference(key, 1, 2) for key in ("data.seed", "tokenizer", "train.global_batch_rows", "steps")]
    of_the_model = [Difference(key, 1, 2) for key in ("task", "labels", "base", "model.config.hidden_size", "law")]
    assert all(difference.is_of_data for difference in of_data)
    assert not any(difference.is_of_data for difference in of_the_model)
    difference = Difference("data.masking.rate", 0.3, {"from": 0.3}, "phase 2 (long)")
    assert Difference.from_json(difference.to_json()) == difference
    assert shown("deadbeef" * 4) == "deadbeefdead…"
    assert shown("a/path") == "a/path"
    assert shown(5 / 7) == "0.714286"
    assert str(Difference("data.masking.rate", 0.3, 0.30000000000000004)) == (
        "data.masking.rate: 0.3 → 0.30000000000000004"
    )


def test_sources_are_remembered_by_name() -> None:
    assert {name: content.digest for name, content in contents_of(RUN).items()} == {"web": WEB, "code": CODE}


# ------------------------------------------------------------------ rows


@st.composite
def runs(draw: st.DrawFn) -> tuple[Identity, list[int]]:
    """An identity, and the batch of each of its data steps and of some beyond its end."""
    sketches = st.builds(PhaseSketch, steps=st.integers(1, 6), rows=st.sampled_from([4, 8, 12]))
    phases = draw(st.lists(sketches, min_size=1, max_size=4))
    batches = [phase.rows for phase in phases for _ in range(phase.steps)]
    return identity(*phases), [*batches, *[phases[-1].rows] * 5]


@settings(deadline=None)
@given(runs(), st.data())
def test_rows_follow_from_data_steps_and_the_other_way_round(
    run: tuple[Identity, list[int]], data: st.DataObject
) -> None:
    found, batches = run
    first_step = data.draw(st.integers(0, len(batches) - 1))
    origin = (first_step, data.draw(st.sampled_from([0, 5, 1000])))
    row, rows = origin[1], GlobalBatches(found, origin)
    for step in range(first_step, len(batches)):
        assert rows.first_row(step) == row
        assert {rows.step_of(row + number) for number in range(batches[step])} == {step}
        row += batches[step]


def test_rows_of_tasks_on_examples_are_of_one_batch() -> None:
    examples: dict[str, Any] = {"global_batch_rows": 8}
    assert (GlobalBatches(examples).first_row(5), GlobalBatches(examples, (3, 100)).first_row(5)) == (40, 116)
    assert (GlobalBatches(examples).step_of(47), GlobalBatches(examples, (3, 100)).step_of(116)) == (5, 5)


def test_it_needs_no_torch() -> None:
    code = "import sys, dstrain.checkpoint.identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
