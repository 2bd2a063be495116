"""Learning rates as functions of the step, over a run and over its phases."""

import itertools
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import masked_lm, phased, timeline_of

from dstrain.plan import learning_rate, warmup_steps
from dstrain.recipe.schema import MaskedLmRecipe
from dstrain.recipe.training import PhaseSchedule, Schedule

PEAK = 3e-4
NAMES = get_args(PhaseSchedule.model_fields["name"].annotation)


def rates_of(recipe: MaskedLmRecipe) -> list[float]:
    """The learning rate of every step, and of the one after the last."""
    timeline = timeline_of(recipe)
    return [learning_rate(recipe, timeline, step) for step in range(timeline.total_steps + 1)]


def shares(steps: int, **schedule: Any) -> list[float]:
    return [rate / PEAK for rate in rates_of(masked_lm(train={"steps": steps}, schedule=schedule))]


def test_linear() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]
    assert shares(10, name="linear", warmup_steps=4) == pytest.approx(expected)


def test_cosine() -> None:
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert shares(8, name="cosine", min_lr_ratio=0.2) == pytest.approx(expected)


def test_constant() -> None:
    assert shares(6, name="constant", warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])


def test_warmup_stable_decay() -> None:
    found = shares(20, name="warmup_stable_decay", warmup_fraction=0.1, decay_fraction=0.25, min_lr_ratio=0.5)
    assert found == pytest.approx([0.5, *[1.0] * 14, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


def test_one_minus_sqrt() -> None:
    found = shares(9, name="one_minus_sqrt", min_lr_ratio=0.1)
    assert found == pytest.approx([1 - 0.9 * math.sqrt(step / 9) for step in range(10)])


def test_inverse_sqrt_is_that_of_the_transformer() -> None:
    found = shares(400, name="inverse_sqrt", warmup_steps=25, min_lr_ratio=0.3)
    steps = range(1, 402)
    transformer = [min(step**-0.5, step * 25**-1.5) / 25**-0.5 for step in steps]  # Vaswani et al. 2017, equation 3
    assert found == pytest.approx([*transformer[:25], *(max(share, 0.3) for share in transformer[25:])])
    assert shares(4, name="inverse_sqrt") == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5])


def test_polynomial() -> None:
    assert shares(4, name="polynomial", power=2.0) == pytest.approx([1, 9 / 16, 4 / 16, 1 / 16, 0])
    assert shares(7, name="polynomial") == pytest.approx(shares(7, name="linear"))


def test_cosine_restarts() -> None:
    found = shares(14, name="cosine_restarts", warmup_steps=2, restarts=2)
    cycle = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert found == pytest.approx([0.5, 1.0, *cycle, *cycle, *cycle, 0.0])


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 60),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
    power=st.floats(0.2, 4),
)
def test_every_schedule_rises_to_its_peak_then_never_rises(
    name: str, total: int, warmup: float, decay: float, final: float, power: float
) -> None:
    restarts = {"restarts": 1} if name == "cosine_restarts" else {}
    keys = {"name": name, "warmup_fraction": warmup, "decay_fraction": decay, "min_lr_ratio": final, "power": power}
    found = shares(total, **keys, **restarts)
    top = warmup_steps(Schedule(warmup_fraction=warmup), total)
    rise, fall = found[:top], found[top:]
    assert all(first < second for first, second in itertools.pairwise(rise))
    assert rise[-1:] in ([], [pytest.approx(1.0)])
    rises = [second > first + 1e-12 for first, second in itertools.pairwise(fall)]
    assert sum(rises) <= (1 if restarts else 0)
    assert all(final - 1e-12 <= share <= 1 + 1e-12 for share in fall)
    if top == total or name == "inverse_sqrt":
        return
    decays = round(decay * total) > 0 if name == "warmup_stable_decay" else name != "constant"
    assert fall[0] == pytest.approx(1.0)
    assert fall[-1] == pytest.approx(final if decays else 1.0)


def test_a_phase_has_its_own_schedule_and_others_go_on_with_the_runs() -> None:
    phases = [
        {"steps": 4},
        {"steps": 3, "optimizer": {"learning_rate": 2 * PEAK}},
        {"steps": 5, "schedule": {"name": "linear", "warmup_steps": 1}, "optimizer": {"learning_rate": 10 * PEAK}},
    ]
    recipe = phased(phases, schedule={"name": "polynomial", "warmup_steps": 2})
    whole = shares(12, name="polynomial", warmup_steps=2)
    expected = [*whole[:4], *(2 * share for share in whole[4:7]), 10, 10, 7.5, 5, 2.5, 0]
    assert [rate / PEAK for rate in rates_of(recipe)] == pytest.approx(expected)


def test_a_plateau_falls_by_its_factor_in_every_phase() -> None:
    plateau = {"metric": "loss", "factor": 0.5, "patience": 1}
    recipe = phased(
        [{"steps": 4}, {"steps": 4, "optimizer": {"learning_rate": PEAK / 2}}],
        schedule={"name": "plateau", "plateau": plateau, "min_lr_ratio": 0.2},
        evaluate={"every_steps": 1},
    )
    timeline = timeline_of(recipe)
    fallen = [learning_rate(recipe, timeline, step, {"reductions": 2}) / PEAK for step in (3, 4)]
    assert fallen == pytest.approx([0.25, 0.125])
    assert learning_rate(recipe, timeline, 5, {"reductions": 9}) == pytest.approx(0.2 * PEAK / 2)
    assert learning_rate(recipe, timeline, 5) == pytest.approx(PEAK / 2)
