"""verify-resume: passes on a recipe that comes back, and sees it when something does not."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks

from dstrain.checkpoint.distance import Distance
from dstrain.cli import main
from dstrain.errors import UserError
from dstrain.plan.timeline import make_timeline
from dstrain.proof.run_distance import RunDistance, run_distance
from dstrain.proof.trial import Trial, TrialError, dropout_rates, trial_recipe
from dstrain.proof.verify_resume import (
    TOLERANCES,
    Verdict,
    make_plan,
    value_objections,
    verdicts_text,
)
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.main import run_rank

RecipeMaker = Callable[..., Recipe]
SAME = Distance(True, 0.0, 0.0)


def distance(**changes: object) -> RunDistance:
    fields: dict[str, object] = {
        "steps": 8,
        "first_other_rows": None,
        "steps_compared": 8,
        "other_counters": [],
        "loss": SAME,
        "gradient_norm": SAME,
        "states": {"weight": SAME, "exp_avg": SAME},
    }
    return RunDistance(**(fields | changes))  # type: ignore[arg-type]


# ------------------------------------------------------------------ what is tried


def arguments(**changes: object) -> Namespace:
    return Namespace(**({"steps": 12, "stop_at": 5, "world": None, "then_world": None, "then_stage": None} | changes))


def test_other_numbers_of_ranks_and_another_stage_are_chosen(tiny_recipe: RecipeMaker) -> None:
    plan = make_plan(tiny_recipe("train.zero.stage=1"), arguments())  # 8 lanes
    assert (plan.worlds, plan.then_stage) == ((2, 3, 1), 3)
    assert (plan.topology, plan.then_topology) == ("2 ranks, ZeRO-1", "3 → 1 rank, ZeRO-3")
    plan = make_plan(tiny_recipe("data.lanes=1"), arguments())  # only one rank is possible
    assert (plan.worlds, plan.then_stage) == ((1, 1), 2)
    plan = make_plan(tiny_recipe(), arguments(world=4, then_world="2", then_stage=0))
    assert (plan.worlds, plan.then_stage) == ((4, 2), 0)
    assert make_plan(tiny_recipe(), arguments(world=5, then_world="7,3")).worlds == (5, 7, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_at": 0}, "--stop-at 0 with --steps 12: the interruption comes after step 1 at the earliest"),
        ({"steps": 6}, "two steps before the end at the latest"),
        ({"world": 9}, "9 ranks cannot train tiny"),
        ({"then_world": "3,16"}, "16 ranks cannot train tiny"),
        ({"then_world": "3;1"}, "--then-world 3;1: give a number of ranks, or several as in 3,1"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, object], message: str, tiny_recipe: RecipeMaker) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(tiny_recipe(), arguments(**changes))


def test_the_recipe_is_cut_short(tiny_recipe: RecipeMaker) -> None:
    recipe = tiny_recipe("schedule.warmup_steps=90", "model.config.hidden_dropout_prob=0.1", "train.zero.stage=3")
    assert dropout_rates(recipe) == {"hidden_dropout_prob": 0.1}
    short = trial_recipe(recipe, 12, 5, dropout=False)
    assert (short.train.steps, short.checkpoint.every_steps, short.log.every_steps) == (12, 5, 1)
    assert (short.schedule.warmup_steps, short.train.zero.stage) == (3, 3)
    assert dropout_rates(short) == {}
    assert dropout_rates(trial_recipe(recipe, 12, 5)) == {"hidden_dropout_prob": 0.1}
    assert trial_recipe(tiny_recipe("train.tokens=9999", "train.steps=null"), 12, 5).train.tokens is None


def test_a_trial_comes_through_all_phases(tiny_recipe: RecipeMaker) -> None:
    phases = "[{steps: 100, schedule: {warmup_steps: 90}}, {tokens: 99999, train: {global_batch_rows: 12}}, {steps: 9}]"
    recipe = tiny_recipe("train.steps=null", "data.lanes=null", f"phases={phases}")
    short = trial_recipe(recipe, 13, 5)
    timeline = make_timeline(short, None)
    assert timeline is not None
    assert [(phase.first_step, phase.steps) for phase in timeline.phases] == [(0, 4), (4, 4), (8, 5)]
    assert (timeline.lanes, timeline.total_steps) == (4, 13)
    assert timeline.phases[0].schedule is not None
    assert timeline.phases[0].schedule.warmup_steps == 1
    few = make_timeline(trial_recipe(recipe, 2, 1), None)
    assert few is not None
    assert ([phase.steps for phase in few.phases], few.lanes) == ([1, 1], 4)


# ------------------------------------------------------------------ what is judged


def test_without_a_tolerance_every_bit_counts() -> None:
    assert value_objections(distance(), None) == []
    off = Distance(False, 1e-9, 1e-12)
    assert value_objections(distance(states={"weight": SAME, "exp_avg": off}), None) == [
        "exp_avg differs by 1.0e-09, and should be equal to the bit"
    ]


def test_what_is_too_far_or_no_number_is_objected_to() -> None:
    far, nan = Distance(False, 1.0, 1e-3), Distance(False, float("inf"), float("nan"))
    found = value_objections(distance(loss=far, gradient_norm=nan), TOLERANCES["fp32"])
    assert found == [
        "loss differs by 1.0e-03 of its size, more than 1e-05",
        "gradient norm differs by nan of its size, more than 1e-04",
    ]
    assert value_objections(distance(loss=far), TOLERANCES["bf16"]) == []


@pytest.mark.parametrize("changes", [{"first_other_rows": 3}, {"steps_compared": 7}, {"other_counters": ["data_step"]}])
def test_rows_are_the_same_only_with_all_steps_and_counters(changes: dict[str, object]) -> None:
    assert distance().same_rows
    assert not distance(**changes).same_rows


def test_the_table() -> None:
    near = Distance(False, 1e-4, 2e-6)
    verdicts = [
        Verdict("SIGKILL of rank 1 in step 7", "2 ranks, ZeRO-2", distance(states={"weight": SAME}), [], None),
        Verdict(
            "SIGTERM, saved at step 7",
            "1 rank, ZeRO-3",
            distance(loss=near, states={"weight": SAME}),
            ["too far"],
            "no dropout",
        ),
    ]
    assert verdicts_text(verdicts).splitlines() == [
        "interruption                 resumed on       rows      loss       gradient norm  weight",
        "SIGKILL of rank 1 in step 7  2 ranks, ZeRO-2  the same  bit-equal  bit-equal      bit-equal  passed",
        "SIGTERM, saved at step 7     1 rank, ZeRO-3   the same  2.0e-06    bit-equal      bit-equal  FAILED",
        "SIGTERM, saved at step 7: too far",
        "SIGTERM, saved at step 7: no dropout",
    ]


# ------------------------------------------------------------------ with real ranks


def train(rank: int, world: int, run_dir: Path) -> str:
    return run_rank(run_dir, 1)


@pytest.mark.ranks
def test_runs_that_differ_are_told_apart(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    changes = {
        "first": (),
        "again": (),
        "seed": ("train.seed=4",),
        "data": ("data.seed=2",),
        "stage": ("train.zero.stage=3",),
    }
    for name, overrides in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(
            resolved_yaml(tiny_recipe("train.steps=3", "schedule.warmup_steps=1", *overrides))
        )
        run_ranks(1, train, tmp_path / name)
    assert run_distance(tmp_path / "again", tmp_path / "first", 3).bit_equal
    other_seed = run_distance(tmp_path / "seed", tmp_path / "first", 3)
    assert other_seed.same_rows
    assert other_seed.states["weight"].relative > 0.1
    assert len(value_objections(other_seed, TOLERANCES["bf16"])) >= 3
    other_data = run_distance(tmp_path / "data", tmp_path / "first", 3)
    assert (other_data.first_other_rows, other_data.same_rows) == (1, False)
    assert "identity" in other_data.other_counters
    other_stage = run_distance(tmp_path / "stage", tmp_path / "first", 3)
    assert other_stage.same_rows
    assert value_objections(other_stage, TOLERANCES["fp32"]) == []


@pytest.mark.ranks
def test_a_recipe_with_dropout_comes_back(
    tmp_path: Path, tiny_recipe: RecipeMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(
        resolved_yaml(tiny_recipe("model.config.hidden_dropout_prob=0.1", "train.zero.stage=1"))
    )
    command = ["verify-resume", str(tmp_path / "tiny.yaml"), "--steps", "24", "--stop-at", "3", "--json"]
    assert main([*command, "--dir", str(tmp_path / "runs")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["topology"]) == (True, "2 ranks, ZeRO-1")
    killed, moved = found["interruptions"]
    assert killed["interruption"].startswith("SIGKILL of rank 1 in step ")
    assert killed["distance"]["states"]["weight"] == {"bit_equal": True, "largest": 0.0, "relative": 0.0}
    assert killed["distance"]["loss"]["bit_equal"]
    assert moved["resumed"] == "3 → 1 rank, ZeRO-3"
    assert re.fullmatch(r"SIGTERM, saved at step \d+ and \d+", moved["interruption"])
    assert moved["note"] == "other micro-batches draw other dropout: both runs without"
    assert 0 < moved["distance"]["loss"]["relative"] < 1e-5
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == [
        "killed", "moved", "whole", "whole-without-dropout",
    ]  # fmt: skip


@pytest.mark.ranks
def test_a_trial_that_fails_shows_the_end_of_its_output(tmp_path: Path, tiny_recipe: RecipeMaker) -> None:
    trial = Trial(tiny_recipe(), tmp_path / "run")
    trial.start(1, ["data.train=/nowhere"])
    with pytest.raises(TrialError, match=r"run: `dstrain run` ended with exit code 2, not 0:\n(.*\n)*.*data\.train"):
        trial.finish(expected=0)
    assert main(["verify-resume", str(tmp_path / "run.yaml"), "--dir", str(tmp_path)]) == 2  # not empty
