import contextlib
import io
import os
import pty
from dataclasses import replace

import pytest
from rich.console import Console

from dstrain.base import durations
from dstrain.observe.progress import RunProgress, Status, figures

STATUS = Status("pretraining", "forward", 120, 500, 5.43214, 12345.6, 80.2, 100, time_unix=1000.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with RunProgress(stream, "tiny-bert", clock) as progress:
        progress.note(
            "tiny-bert: attempt 1, 2 ranks, newest checkpoint at step 100; logs in runs/tiny-bert/attempts/0001/logs"
        )
        progress.starts_from(100)
        for tenth in range(130):  # 13 seconds at ten steps a second
            clock.now = tenth / 10
            step = 101 + tenth
            saved = 200 if step >= 200 else 100
            progress.show(replace(STATUS, step=step, last_checkpoint_step=saved), now_unix=1000.0)
        progress.note("tiny-bert: done; everything is in runs/tiny-bert")
    assert (
        stream.getvalue()
        == """\
tiny-bert: attempt 1, 2 ranks, newest checkpoint at step 100; logs in runs/tiny-bert/attempts/0001/logs
tiny-bert: pretraining, step 101/500 (20 %), loss 5.4321, 12,346 tok/s, 0:01:20 left, forward
tiny-bert: pretraining, step 151/500 (30 %), loss 5.4321, 12,346 tok/s, 0:01:20 left, forward
tiny-bert: checkpoint at step 200
tiny-bert: pretraining, step 201/500 (40 %), loss 5.4321, 12,346 tok/s, 0:01:20 left, forward
tiny-bert: done; everything is in runs/tiny-bert
"""
    )


def test_a_status_that_is_shown_again_and_again_makes_one_line() -> None:
    stream, clock = io.StringIO(), Clock()
    with RunProgress(stream, "tiny-bert", clock) as progress:
        progress.starts_from(100)
        for second in range(100):
            clock.now = float(second)
            progress.show(STATUS, now_unix=1000.0)
    assert len(stream.getvalue().splitlines()) == 1


def test_what_is_not_known_is_not_shown() -> None:
    assert figures(Status.from_json({}), 0.0) == "0"
    assert figures(Status.from_json({"step": 7, "phase": "data", "time_unix": 5.0}), 5.0) == "7, data"


def test_a_rank_that_stopped_moving_is_seen() -> None:
    assert figures(STATUS, 1075.0).endswith(", forward for 0:01:15")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90061, "1 d 1:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert durations.clock(seconds) == text


def test_brackets_are_text_not_markup() -> None:
    stream = io.StringIO()
    with RunProgress(stream, "x") as progress:
        progress.note("[gloo] Connection closed by peer [127.0.0.1]:1 [/red]")
    assert stream.getvalue() == "[gloo] Connection closed by peer [127.0.0.1]:1 [/red]\n"


def test_output_that_goes_away_does_not_end_the_run() -> None:
    read, write = os.pipe()
    stream = os.fdopen(write, "w", buffering=1)
    with RunProgress(stream, "x") as progress:
        os.close(read)
        progress.note("nobody reads this")
        progress.show(STATUS, 1000.0)
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    closed = io.StringIO()
    closed.close()
    with RunProgress(closed, "x") as progress:
        progress.note("nor this")


def test_a_terminal_gets_one_bar_that_ends_with_the_newest_figures() -> None:
    main, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        assert Console(file=stream).is_terminal
        with RunProgress(stream, "tiny-bert") as progress:
            progress.show(replace(STATUS, step=1), 1000.0)
            progress.note("tiny-bert: something happened")
            progress.show(replace(STATUS, step=499), 1000.0)
    text = b""
    with contextlib.suppress(OSError):  # EIO after the last byte, as the other end is closed
        while block := os.read(main, 4096):
            text += block
    os.close(main)
    lines = text.decode().splitlines()
    assert any("tiny-bert: something happened" in line for line in lines)
    assert any("499/500 (100 %), loss 5.4321, 12,346 tok/s" in line for line in lines[-2:])
