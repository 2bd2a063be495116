from pathlib import Path

import pytest

from dstrain.rundir.timings import Timings, p99


def status(
    step: int, time: float, phase: str = "forward", saved: int | None = None, attempt: int = 1
) -> dict[str, object]:
    seconds = {} if saved is None else {"save_seconds": 5.0 + saved, "save_stall_seconds": 0.5}
    known = {"attempt": attempt, "step": step, "time_unix": time, "phase": phase, "last_checkpoint_step": saved}
    return known | seconds


def test_steps_and_saves_are_told_apart() -> None:
    timings = Timings()
    seen = [
        status(1, 100.0),
        status(2, 102.0),
        status(2, 103.0, "backward"),
        status(5, 111.0),  # three steps of three seconds
        status(6, 113.0),
        status(7, 114.0, "saved", saved=5),  # beside training
        status(8, 116.0, saved=5),
        status(9, 118.0, saved=5),
    ]
    for content in seen:
        timings.observe(content)
    assert list(timings.step_seconds) == [2.0, 3.0, 2.0, 2.0, 2.0]
    assert list(timings.save_seconds) == [10.0]
    assert list(timings.stall_seconds) == [0.5]


def test_what_lies_between_two_attempts_is_neither() -> None:
    timings = Timings()
    for content in (status(5, 100.0), status(7, 300.0, attempt=2), status(8, 301.0, attempt=2)):
        timings.observe(content)
    assert list(timings.step_seconds) == [1.0]


def test_the_lead_is_two_slow_steps_two_slow_saves_and_some_seconds() -> None:
    assert Timings().lead_seconds() == 600
    assert Timings().lead_seconds(limit_seconds=300) == 100
    assert Timings([4.0], [20.0]).lead_seconds() == 2 * 4 + 2 * 20 + 30
    assert Timings([4.0], [20.0]).lead_seconds(limit_seconds=30) == 10


def test_they_are_kept_in_the_runs_folder(tmp_path: Path) -> None:
    assert Timings.read(tmp_path).lead_seconds() == 600
    Timings([4.0], [20.0]).write(tmp_path)
    assert Timings.read(tmp_path).lead_seconds() == 78
    Timings([4.0], [20.0], [0.1]).write(tmp_path)
    assert list(Timings.read(tmp_path).stall_seconds) == [0.1]
    Timings([4.0]).write(tmp_path)  # not one of each: nothing is known better than before
    assert Timings.read(tmp_path).lead_seconds() == 78
    (tmp_path / "timings.json").write_text("{")
    assert Timings.read(tmp_path).lead_seconds() == 600


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (99, 99), (100, 99), (1000, 990)])
def test_p99(count: int, expected: int) -> None:
    assert p99([float(value) for value in range(1, count + 1)]) == expected
