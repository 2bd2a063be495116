"""What the terminal shows of a run: one progress bar that lives across restarts, or plain lines without a terminal.

The ranks print nothing; rank 0 writes `status/HOST.json` a few times a second, and this draws the newest one.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dstrain.base import durations

PLAIN_LINE_EVERY_SECONDS = 5.0
STALL_SHOWN_AFTER_SECONDS = 10.0
MIN_BAR_CHARACTERS, MAX_BAR_CHARACTERS = 5, 40


@dataclass(frozen=True)
class Status:
    """A status file's content as far as it is shown. None: not known yet."""

    stage: str
    phase: str
    step: int
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    last_checkpoint_step: int | None
    time_unix: float
    part: str | None = None  # of several phases, the one that is trained
    source_losses: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Reads `status/HOST.json`; whatever is missing or null there is unknown."""
        return cls(
            stage=content.get("stage") or "training",
            phase=content.get("phase") or "",
            step=content.get("step") or 0,
            total_steps=content.get("total_steps"),
            loss=content.get("loss"),
            tokens_per_second=content.get("tokens_per_second"),
            seconds_left=content.get("seconds_left"),
            last_checkpoint_step=content.get("last_checkpoint_step"),
            time_unix=content.get("time_unix") or 0.0,
            part=content.get("part"),
            source_losses=content.get("source_losses") or {},
        )


class RunProgress:
    """Shows a run while it runs: `with RunProgress(…) as progress: progress.show(status); progress.note("…")`.

    Never raises for the sake of its output: a terminal that went away must not take the run with it.
    """

    def __init__(self, stream: TextIO, description: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = _Console(file=stream, highlight=False, soft_wrap=True)
        self._description = description
        self._clock = clock
        self._bar: Progress | None = None
        self._bar_column = BarColumn()
        self._line_at = -PLAIN_LINE_EVERY_SECONDS
        self._line_step: int | None = None
        self._checkpoint_step = -1

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                self._bar_column,
                _Figures(),
                console=self._console,
                auto_refresh=False,  # by `show` alone: no thread, no output that fails where nobody catches it
                redirect_stdout=False,
                redirect_stderr=False,
            )
            with self._forgiving():
                self._bar.add_task(self._description, total=None, figures="starting")
                self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            with self._forgiving():
                self._bar.stop()

    def starts_from(self, checkpoint_step: int | None) -> None:
        """An attempt starts; the newest checkpoint that there is now is nothing to report."""
        self._checkpoint_step = -1 if checkpoint_step is None else checkpoint_step
        self._line_step = None
        if self._bar is not None:
            with self._forgiving():
                self._bar.update(self._bar.task_ids[0], figures="starting")
                self._bar.refresh()

    def note(self, text: str) -> None:
        """One thing that happened, as a line (or several) of its own above the bar."""
        with self._forgiving():
            self._console.print(Text(text))

    def show(self, status: Status, now_unix: float) -> None:
        """Draw `status`; call it as often as you like. Checkpoints become notes by themselves."""
        saved = status.last_checkpoint_step
        if saved is not None and saved > self._checkpoint_step:
            self.note(f"{self._description}: checkpoint at step {saved:,}")
            self._checkpoint_step = saved
        with self._forgiving():
            if self._bar is not None:
                text = figures(status, now_unix)
                room = self._console.width - len(self._description) - len(text) - 2
                self._bar_column.bar_width = max(MIN_BAR_CHARACTERS, min(MAX_BAR_CHARACTERS, room))
                task = self._bar.task_ids[0]
                self._bar.update(task, completed=status.step, total=status.total_steps, figures=text)
                self._bar.refresh()
            elif self._line_is_due(status):
                self._line_at, self._line_step = self._clock(), status.step
                stage = status.stage if status.part is None else f"{status.stage}, {status.part}"
                self._console.print(Text(f"{self._description}: {stage}, step {figures(status, now_unix)}"))

    def _line_is_due(self, status: Status) -> bool:
        moved = status.step > 0 and status.step != self._line_step
        return moved and self._clock() - self._line_at >= PLAIN_LINE_EVERY_SECONDS

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Output that fails (closed pipe, terminal gone) is given up for good, the run goes on."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._console.quiet = True


class _Console(Console):
    """One that outlives its reader: rich's own ends the program when a pipe is closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Figures(ProgressColumn):
    """Everything right of the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True)


def how_far(
    step: int,
    total_steps: int | None,
    loss: float | None,
    tokens_per_second: float | None,
    seconds_left: float | None,
    source_losses: Mapping[str, float],
) -> list[str]:
    """`120/500 (24 %)`, `loss 5.4321 (web 5.51, code 4.98)`, `12,345 tok/s`, `0:01:20 left`: those that are known."""
    parts = [f"{step:,}/{total_steps:,} ({100 * step / total_steps:.0f} %)" if total_steps else f"{step:,}"]
    if loss is not None:
        by_source = ", ".join(f"{name} {value:.2f}" for name, value in source_losses.items())
        parts.append(f"loss {loss:.4f}" + (f" ({by_source})" if by_source else ""))
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tok/s")
    if seconds_left is not None:
        parts.append(f"{durations.clock(seconds_left)} left")
    return parts


def figures(status: Status, now_unix: float) -> str:
    """`120/500 (24 %), loss 5.4321, 12,345 tok/s, 0:01:20 left, forward`: what is known of it."""
    parts = how_far(
        status.step,
        status.total_steps,
        status.loss,
        status.tokens_per_second,
        status.seconds_left,
        status.source_losses,
    )
    if status.phase:
        silent_seconds = now_unix - status.time_unix
        stalled = silent_seconds >= STALL_SHOWN_AFTER_SECONDS
        parts.append(f"{status.phase} for {durations.clock(silent_seconds)}" if stalled else status.phase)
    return ", ".join(parts)
