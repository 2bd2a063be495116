"""Every fault of the catalogue, really injected into a run of a tiny recipe; and how an outcome is judged."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import main
from dstrain.diagnose.failure import RankFailure
from dstrain.diagnose.verdict import Verdict
from dstrain.errors import UserError
from dstrain.proof.course import Course
from dstrain.proof.drill import Outcome, make_plan, outcomes_text, try_fault, verdict_objections
from dstrain.proof.faults import CATALOGUE, NAMES, Expected
from dstrain.proof.memory_group import MemoryGroup
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml

RecipeMaker = Callable[..., Recipe]
KILLED = Verdict(
    attempt=1,
    first=RankFailure(rank=1, host="node7", exit_code=-9, time_unix=1.0),
    consequences=(),
    cause="something outside the run sent SIGKILL",
    remedy="",
    decision="restart",
    reason="",
)

# fault: who and how, as the verdict has it; the most steps that may be lost (saved every 4; a step may go by unseen)
SIGKILL = "rank 1: killed by SIGKILL (something outside the run sent SIGKILL): restart"
TABLE = {
    "kill": (SIGKILL, 8),
    "segfault": ("rank 1: killed by SIGSEGV (a crash in native code): restart", 8),
    "exception": ("rank 1: RuntimeError: restart", 8),
    "out-of-memory": ("rank 1: killed by SIGKILL (the kernel's out-of-memory killer): restart", 8),
    "lost-in-save": (SIGKILL, 8),
    "slow-disk": ("none: no rank failed", 0),
    "full-disk": ("rank 1: CheckpointError (the disk is full): user error", 8),
    "corrupt-shard": ("rank 0: CorpusError: user error", 8),
    "flipped-bit": ("none: the command was killed", 12),
    "torn-latest": ("none: the command was killed", 8),
    "frozen": ("rank 1: killed by SIGKILL (something stopped its process): restart", 8),
    "hung": ("rank 1: killed by SIGKILL (it hangs, and the other ranks waited for it): restart", 8),
    "wedged-reader": ("rank 1: killed by SIGKILL (its data process made no rows): restart", 8),
    "stop": ("none: exit code 75", 0),
}


# ------------------------------------------------------------------ what is tried


def arguments(**changes: object) -> Namespace:
    return Namespace(**({"faults": None, "steps": None, "save_every": 4, "world": None} | changes))


def test_all_faults_are_tried_unless_some_are_named(tiny_recipe: RecipeMaker) -> None:
    plan = make_plan(tiny_recipe(), arguments())
    assert (plan.faults, plan.world) == (CATALOGUE, 2)
    assert [fault.name for fault in make_plan(tiny_recipe(), arguments(faults="stop, kill")).faults] == ["stop", "kill"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faults": "kill,sigkil"}, "--faults: there is no sigkil; there are kill, segfault"),
        ({"steps": 8}, "--steps 8 with --save-every 4: at least 32 steps"),
        ({"save_every": 5}, "saved every 1 to 4"),
        ({"world": 9}, "9 ranks cannot train tiny"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, object], message: str, tiny_recipe: RecipeMaker) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(tiny_recipe(), arguments(**changes))


def test_what_a_machine_does_not_allow_is_not_passed_but_said(tiny_recipe: RecipeMaker, tmp_path: Path) -> None:
    course = Course(tiny_recipe(), tmp_path / "run", 2, None, False, 0.0, 1.0)
    missing = {fault.name: why for fault in CATALOGUE if (why := fault.missing(course)) is not None}
    assert set(missing) == {"out-of-memory", "full-disk"}
    assert all("; run as root, or" in why for why in missing.values())
    assert "not tried" in outcomes_text([Outcome("full-disk", "", notes=[missing["full-disk"]])])


# ------------------------------------------------------------------ what is judged


@pytest.mark.parametrize(
    ("expected", "objection"),
    [
        (Expected(how="killed by SIGKILL", cause="something outside"), []),
        (Expected(how="SIGSEGV"), ["the verdict's what is 'killed by SIGKILL', which has no 'SIGSEGV'"]),
        (
            Expected(cause="disk"),
            ["the verdict's cause is 'something outside the run sent SIGKILL', which has no 'disk'"],
        ),
        (Expected(decision="user error"), ["the decision is 'restart', not 'user error'"]),
        (Expected(fails=False), [f"there is a verdict, though nothing failed: {SIGKILL}"]),
    ],
)
def test_a_verdict_has_to_be_the_expected_one(expected: Expected, objection: list[str]) -> None:
    assert verdict_objections(expected, KILLED, 1) == objection


def test_a_verdict_has_to_be_there_and_blame_the_right_rank() -> None:
    assert verdict_objections(Expected(), KILLED, 0) == ["the verdict blames rank 1, not 0"]
    assert verdict_objections(Expected(blames_rank=False), KILLED, 0) == []
    assert verdict_objections(Expected(), None, 1) == ["there is no verdict"]
    assert verdict_objections(Expected(fails=False), None, 1) == []


def test_the_table() -> None:
    seconds = {"stop": 0.5, "restart": 5.25, "load": 0.01, "first step": 1.0}
    good = Outcome("kill", "", "survived", "rank 1", 0.04, seconds, 2, 0, True, 8)
    bad = Outcome("stop", "", "FAILED", "none", notes=["exit code 1, not 75"])
    assert good.restarted_after == pytest.approx(6.8)
    head, *lines = outcomes_text([good, bad]).splitlines()
    assert head == (
        "fault  verdict  detected after  stop   restart  load   first step  restarted after  lost steps  rows ±  "
        "afterwards"
    )
    assert [" ".join(line.split()) for line in lines] == [
        "kill rank 1 0.0 s 0.5 s 5.2 s 0.0 s 1.0 s 6.8 s 2 0 bit-equal survived",
        "stop none FAILED",
        "stop: exit code 1, not 75",
    ]


# ------------------------------------------------------------------ with real ranks, signals, disks and limits


@pytest.mark.ranks
@pytest.mark.timeout(1500)  # it takes four minutes on an idle machine, and what it waits for has limits of its own
def test_every_fault_is_survived(
    tmp_path: Path, tiny_recipe: RecipeMaker, capsys: pytest.CaptureFixture[str], show: Callable[[str], None]
) -> None:
    recipe = tiny_recipe("model.config.hidden_dropout_prob=0.1", "train.zero.stage=1")
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(recipe))
    folder = tmp_path / "runs"
    code = main(["drill", str(tmp_path / "tiny.yaml"), "--json", "--dir", str(folder)])
    found = json.loads(capsys.readouterr().out)
    outcomes = {outcome.pop("fault"): outcome for outcome in found["faults"]}
    show(outcomes_text([as_outcome(name, outcome) for name, outcome in outcomes.items()]))
    assert tuple(outcomes) == NAMES == tuple(TABLE)
    for name, (verdict, most_lost) in TABLE.items():
        outcome = outcomes[name]
        assert (name, outcome["result"], outcome["notes"]) == (name, "survived", [])
        found_verdict = outcome["verdict"]
        if name == "corrupt-shard":  # whichever rank comes to it first
            found_verdict = found_verdict.replace("rank 1", "rank 0")
        assert (name, found_verdict) == (name, verdict)
        assert 0 <= outcome["lost_steps"] <= most_lost, name
        assert outcome["rows_repeated_or_skipped"] == 0
        assert outcome["bit_equal"] is True
        assert (name == "slow-disk") == (outcome["restarted_after"] is None)
        assert ("rank" in verdict.partition(":")[0]) == (outcome["detected_after"] is not None)
    assert outcomes["flipped-bit"]["lost_steps"] > 4  # the damaged checkpoint was passed over
    assert (code, found["passed"]) == (0, True)
    assert [file.name for file in folder.iterdir() if file.name.startswith("course")].count("course-2") == 0
    unexpected(tmp_path, folder)


def unexpected(tmp_path: Path, folder: Path) -> None:
    """The same run goes on, and is now expected to fail otherwise than it does."""
    recipe = load_recipe(folder / "course-1.yaml").recipe
    course = Course(recipe, folder / "course-1", 2, None, False, 0.05, 120.0)
    outcome = Outcome("kill", "")
    try:
        try_fault(course, replace(CATALOGUE[0], expected=Expected(how="SIGSEGV")), outcome, folder / "whole")
    finally:
        course.trial.end()
    assert (outcome.result, outcome.bit_equal) == ("FAILED", True)
    assert outcome.notes == ["the verdict's what is 'killed by SIGKILL', which has no 'SIGSEGV'"]


def as_outcome(name: str, content: dict[str, Any]) -> Outcome:
    return Outcome(name, **{key: value for key, value in content.items() if key != "restarted_after"})


def test_a_memory_group_limits_and_goes_away() -> None:
    group = MemoryGroup.create()
    if group is None:
        pytest.skip("no control group can be made here; run as root")
    try:
        group.limit(1 << 30)
        group.limit(None)
        assert group.used_bytes() >= 0
    finally:
        group.remove()
    assert not group.folder.exists()
