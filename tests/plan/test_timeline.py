"""The course of a run: phases, rows, tokens, and where sources end."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from planned import classification, masked_lm, mixed, phased, timeline_of

from dstrain.data.layout import Layout
from dstrain.data.line import Line
from dstrain.errors import RecipeError
from dstrain.plan import in_phase, make_timeline
from dstrain.plan.streams import training_stream


def phases_of(phases: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Phases of so many steps, of four times so many rows, of so many tokens."""
    return [
        {"steps": steps, "data": {"sequence_length": length}, "train": {"global_batch_rows": 4 * rows}}
        for steps, rows, length in phases
    ]


LANES = 4


def epoch_tokens(tokens: int) -> list[int]:
    """The tokens of each lane in the first epoch."""
    line = Line(tokens, LANES, (0, "train", "digest"), block_tokens=8, window_blocks=2)
    return [line.epoch_start(lane, 1) for lane in range(LANES)]


@pytest.mark.parametrize(
    ("length", "tokens", "steps"),
    [
        ({"steps": 7}, None, 7),
        ({"steps": None, "tokens": 65_536 * 3}, None, 3),
        ({"steps": None, "tokens": 65_536 * 3 + 1}, None, 4),
        ({"steps": None, "epochs": 2.5}, 65_536 * 2, 5),
        ({"steps": None, "epochs": 0.1}, 65_536 * 10, 1),
        ({"steps": None, "epochs": 3.0}, 65_536 + 1, 4),
        ({"steps": None, "epochs": 3.0}, {"train": 65_536 + 1}, 4),
        ({"steps": None, "epochs": 1.0}, None, None),
    ],
)
def test_the_length_of_a_run_of_one_phase(length: dict[str, Any], tokens: int | None, steps: int | None) -> None:
    timeline = make_timeline(masked_lm(train=length), tokens)
    assert (None if timeline is None else timeline.total_steps) == steps


def test_another_task_has_one_phase() -> None:
    timeline = timeline_of(classification(epochs=2), 128 * 3200)
    (phase,) = timeline.phases
    assert (phase.steps, phase.global_batch_rows, phase.masking_rate, timeline.notes) == (200, 32, (0.0, 0.0), ())
    assert timeline.tokens_before(200) == 200 * 32 * 128


def test_phases_follow_each_other() -> None:
    ramp = {"from": 0.3, "to": 0.1}
    recipe = phased(
        [
            {"name": "short", "steps": 10},
            {"tokens": 32 * 24 * 3 - 5, "data": {"sequence_length": 32}, "train": {"global_batch_rows": 24}},
            {"steps": 5, "data": {"masking": {"rate": ramp}}, "model": {"global_rope_theta": 7.0}},
            {"steps": 1, "model": {"max_position_embeddings": 64}},
        ],
        architecture="modernbert",
    )
    timeline = timeline_of(recipe)
    assert [phase.name for phase in timeline.phases] == ["short", "phase 2", "phase 3", "phase 4"]
    assert [phase.steps for phase in timeline.phases] == [10, 3, 5, 1]
    assert [phase.first_step for phase in timeline.phases] == [0, 10, 13, 18]
    assert [phase.first_row for phase in timeline.phases] == [0, 80, 80 + 72, 80 + 72 + 40]
    assert [phase.first_token for phase in timeline.phases] == [0, 1280, 1280 + 2304, 1280 + 2304 + 640]
    assert timeline.phases[2].rope == {"global_rope_theta": 7.0}
    assert timeline.phases[3].rope == {"global_rope_theta": 7.0, "max_position_embeddings": 64}
    assert [timeline.phases[2].masking_rate_at(step) for step in range(13, 20)] == pytest.approx(
        [0.3, 0.25, 0.2, 0.15, 0.1, 0.1, 0.1]
    )
    assert timeline.phase_at(12).number == 1
    assert timeline.phase_at(10**9).number == 3
    assert (timeline.rows_before(11), timeline.rows_before(19), timeline.rows_before(21)) == (104, 200, 216)
    assert timeline.tokens_before(11) == 1280 + 32 * 24
    assert timeline.lanes == 8
    seen = in_phase(recipe, timeline.phases[2])
    assert seen.data.row_tokens == 16
    assert in_phase(recipe, timeline.phases[1]).train.global_batch_rows == 24


SHORT_PHASES = st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from([8, 16, 48]))


@given(phases=st.lists(SHORT_PHASES, min_size=1, max_size=4))
def test_rows_and_tokens_before_a_step_are_sums_over_those_before_it(phases: list[tuple[int, int, int]]) -> None:
    recipe = phased(phases_of(phases))
    timeline = timeline_of(recipe)
    of_steps = [(4 * rows, 4 * rows * length) for steps, rows, length in phases for _ in range(steps)]
    assert timeline.total_steps == len(of_steps)
    for step in range(len(of_steps) + 1):
        assert timeline.rows_before(step) == sum(rows for rows, _ in of_steps[:step])
        assert timeline.tokens_before(step) == sum(tokens for _, tokens in of_steps[:step])


# ---------------------------------------------------------------- sources


def test_weights_are_shares_and_a_phase_may_have_its_own() -> None:
    sources = {"a": {"weight": 3}, "b": {}, "new": {"weight": 0}}
    phases = [{"steps": 10}, {"steps": 20, "data": {"sources": {"new": 2, "a": 2}}}]
    timeline = timeline_of(mixed(sources, phases), {"a": 1280, "b": 100})
    assert [phase.weights for phase in timeline.phases] == [(0.75, 0.25, 0.0), (0.5, 0.0, 0.5)]
    assert timeline.source_tokens_before(1, 10) == timeline.source_tokens_before(1, 30) == 20 * 16
    assert timeline.epochs(0, 10) == pytest.approx(0.75, abs=0.05)
    assert timeline.epochs(2, 30) is None
    assert timeline.notes[:2] == ("a: 1.8 epochs", "b: 3.2 epochs")
    assert timeline.notes[2] == (
        "new: how many epochs is not known until its tokens are counted: `dstrain shards index new --tokenizer tok`"
    )


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(64, 3000), min_size=1, max_size=3),
    ends=st.lists(st.sampled_from(["repeat", "stop", "drop"]), min_size=3, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    phases=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3), st.sampled_from([8, 16])), min_size=1, max_size=3),
)
@pytest.mark.slow
def test_sources_end_where_the_rows_say_so(
    sizes: list[int], ends: list[str], weights: list[int], phases: list[tuple[int, int, int]]
) -> None:
    """Against the layout of rows: nothing of a second epoch is read, and with one step more some would be."""
    names = "abc"[: len(sizes)]
    sources = {
        name: {"weight": weight, "when_exhausted": end} for name, weight, end in zip(names, weights, ends, strict=False)
    }
    recipe = mixed(sources, phases_of(phases), data={"lanes": LANES})
    may_repeat = np.array([sources[name]["when_exhausted"] == "repeat" for name in names])
    first_epoch = np.array([epoch_tokens(size) for size in sizes])
    try:
        timeline = make_timeline(recipe, dict(zip(names, sizes, strict=True)))
    except RecipeError:  # not a step of the run can be made
        repeated = {name: {"weight": source["weight"]} for name, source in sources.items()}
        endless = mixed(repeated, phases_of(phases), data={"lanes": LANES})
        read = lane_tokens(Layout(training_stream(endless, timeline_of(endless))), 0, len(sizes))
        assert (~may_repeat & (read > first_epoch).any(axis=1)).any()
        return
    assert timeline is not None
    layout = Layout(training_stream(recipe, timeline))
    read = np.zeros((len(sizes), LANES), np.int64)
    for step in range(timeline.total_steps + 1):
        assert (may_repeat | (read <= first_epoch).all(axis=1)).all(), "more than an epoch was read"
        assert [timeline.source_tokens_before(source, step) for source in range(len(sizes))] == read.sum(1).tolist()
        if step < timeline.total_steps:
            read += lane_tokens(layout, step, len(sizes))
    planned_ends = np.cumsum([steps for steps, _, _ in phases]).tolist()
    if timeline.total_steps < planned_ends[-1]:
        assert timeline.notes[-len(sizes) - 1].endswith(f"{planned_ends[-1] - timeline.total_steps} steps early")
    early = [phase.end_step for phase in timeline.phases if phase.end_step not in planned_ends]
    if early:  # until then rows are as in a run where nothing ever ends
        repeated = {name: {"weight": source["weight"]} for name, source in sources.items()}
        endless = mixed(repeated, phases_of(phases), data={"lanes": LANES})
        layout = Layout(training_stream(endless, timeline_of(endless)))
        read = sum(lane_tokens(layout, step, len(sizes)) for step in range(early[0] + 1))
        assert (~may_repeat & (read > first_epoch).any(axis=1)).any()


def lane_tokens(layout: Layout, step: int, sources: int) -> NDArray[np.int64]:
    """(sources, lanes): what each lane reads of each source in a step."""
    places = layout.places(step, np.arange(LANES))
    rows = [(places.sources == source).sum(axis=1) for source in range(sources)]
    return np.array(rows) * places.phase.spec.sequence_length


def test_a_source_that_is_exhausted_ends_the_run_or_is_dropped() -> None:
    sources = {"web": {"weight": 3}, "code": {"when_exhausted": "stop"}}
    phases = [{"name": "only", "steps": 100, "data": {"masking": {"rate": {"from": 0.4, "to": 0.2}}}}]
    tokens = {"web": 100_000, "code": 50 * 2 * 16}
    stopped = timeline_of(mixed(sources, phases), tokens)
    assert stopped.notes[0] == "code is exhausted at step 48, and the run ends there, 52 steps early"
    assert (stopped.total_steps, len(stopped.phases)) == (48, 1)
    assert stopped.phases[0].masking_rate == (0.4, 0.2)

    sources["code"]["when_exhausted"] = "drop"
    own = [{**phases[0], "schedule": {"name": "linear"}}]
    dropped = timeline_of(mixed(sources, own), tokens)
    assert dropped.notes[0] == "code is exhausted at step 48 and dropped; the other sources share its rows"
    first, second = dropped.phases
    assert (first.steps, second.steps, dropped.total_steps) == (48, 52, 100)
    assert (second.weights, second.name, second.number, second.first_row) == ((1.0, 0.0), "only", 1, 48 * 8)
    assert [(part.schedule_first_step, part.schedule_steps) for part in dropped.phases] == [(0, 100), (0, 100)]
    rates = [dropped.phase_at(step).masking_rate_at(step) for step in range(100)]
    assert rates == pytest.approx(np.linspace(0.4, 0.2, 100).tolist())
    assert dropped.epochs(1, 100) == pytest.approx(0.96)


def test_without_any_source_left_the_run_ends() -> None:
    sources = {"a": {"when_exhausted": "drop"}, "b": {}}
    tokens = {"a": 8 * 16 * 10 + 100, "b": 10**6}
    alone = timeline_of(mixed(sources, [{"steps": 100, "data": {"sources": {"a": 1}}}]), tokens)
    assert alone.total_steps == 10
    assert alone.notes[:2] == ("a is exhausted at step 10, and the run ends there, 90 steps early", "a: 0.9 epochs")
    phases = [{"steps": 100, "data": {"sources": {"a": 1, "b": 1}}}, {"steps": 30, "data": {"sources": {"a": 1}}}]
    later = timeline_of(mixed(sources, phases), tokens)
    assert [phase.weights for phase in later.phases] == [(0.5, 0.5), (0.0, 1.0)]
    assert later.notes[1] == "no source is left at step 100, and the run ends there, 30 steps early"
    with pytest.raises(RecipeError, match="a source that is not repeated has not the rows of one step of phase 1; use"):
        make_timeline(mixed(sources, [{"steps": 3, "data": {"sources": {"a": 1}}}]), {"a": 100})
