"""What a run tells the world: metrics.jsonl, trackers such as TensorBoard, the ledger, and the status file of progress.

Rank 0 writes; on the other ranks a call leaves a sign of life, and returns at once.
"""

import contextlib
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dstrain.base.phases import RankPhase
from dstrain.base.tracker import TRACKERS
from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, LedgerWriter, end_of_last_line
from dstrain.recipe.schema import Recipe
from dstrain.rundir.goodput import seconds_before
from dstrain.rundir.heartbeat import HeartbeatWriter
from dstrain.rundir.wall_time import WallTime, started_unix
from dstrain.runtime.runtime import Runtime

STATUS_EVERY_SECONDS = 0.3
METRICS_NAME = "metrics.jsonl"
_ACCOUNT = ("time_unix", "attempt", "from_step")  # of a line; no curves


class Reporter:
    """`with Reporter(…) as report:`, then `report.phase(…)`, `report.metrics({...})`, `report.ledger(…)`."""

    def __init__(self, runtime: Runtime, recipe: Recipe, run_dir: Path, attempt: int, total_steps: int) -> None:
        self._heartbeat = HeartbeatWriter(runtime.rank)
        self._speaks = runtime.rank == 0
        if not self._speaks:
            return
        self._run_dir, self._attempt = run_dir, attempt
        self._started_unix = started_unix(run_dir, attempt)
        self._wall_time, self._from_step = WallTime(self._started_unix), 0
        self._seconds_before: dict[str, float] | None = None  # of the attempts before this one
        self._status_path = run_dir / "status" / f"{runtime.host}.json"
        self._status: dict[str, Any] = {
            "stage": recipe.task.replace("_", " "),
            "part": None,  # of several phases, the one that is trained
            "attempt": attempt,
            "world_size": runtime.world_size,
            "step": 0,
            "total_steps": total_steps,
            "phase": RankPhase.STARTING,
            "loss": None,
            "source_losses": {},  # of a mixture, by source
            "tokens_per_second": None,
            "seconds_left": None,
            "data_wait_share": None,
            "last_checkpoint_step": None,
            "saving": None,  # the phase of a save, which may be beside training
            "save_seconds": None,
            "save_stall_seconds": None,
        }
        self._status_written = 0.0
        self._status_path.parent.mkdir(parents=True, exist_ok=True)
        self._metrics = (run_dir / METRICS_NAME).open("a", encoding="utf-8", buffering=1)
        self._metrics.truncate(end_of_last_line(run_dir / METRICS_NAME))  # a kill, or a full disk, may have torn it
        self._ledger = LedgerWriter(run_dir / LEDGER_NAME)
        names = dict.fromkeys((*(["tensorboard"] if recipe.log.tensorboard else []), *recipe.log.trackers))
        plain = recipe.model_dump(mode="json")
        self._trackers = [TRACKERS.named(name, "log.trackers")(run_dir, plain) for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._speaks:
            self._write_status()
            self._metrics.close()
            self._ledger.close()
            for tracker in self._trackers:
                tracker.close()

    def phase(self, phase: RankPhase, *, within: float | None = None, **status: Any) -> None:
        """Say what the run is doing now, and anything else that the status file shows.

        `within`: see `HeartbeatWriter.begin`.
        """
        self._heartbeat.begin(phase, status.get("step"), within)
        if not self._speaks:
            return
        self._wall_time.begin(phase)
        if phase is RankPhase.LOAD:  # the step that it goes on from
            self._from_step = status.get("step", self._from_step)
        self._status |= {"phase": phase, **status}
        if status or time.monotonic() - self._status_written > STATUS_EVERY_SECONDS:
            self._write_status()

    def saving(self, phase: RankPhase) -> None:
        """Say what a save is doing now. The one call that comes from another thread; no sign of training's life."""
        if self._speaks:
            self._status["saving"] = phase

    def progress(self, step: int) -> None:
        """Note that `step` global steps are done."""
        self._heartbeat.begin(RankPhase.MADE, step)
        if self._speaks:
            self._status["step"] = step

    def metrics(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; numbers go to trackers too, those of a source as `loss/NAME` and so on.

        `values` has a "step".
        """
        if not self._speaks:
            return
        if "loss" in values or "saved_step" in values:
            values = values | self._time()
        self._metrics.write(json.dumps(values) + "\n")
        for name in ("loss", "tokens_per_second", "seconds_left", "data_wait_share"):
            if name in values:
                self._status[name] = values[name]
        by_source: dict[str, dict[str, float | None]] = values.get("sources", {})
        for source, measured in by_source.items():
            if measured["loss"] is not None:
                self._status["source_losses"] |= {source: measured["loss"]}
        if self._trackers:
            named = {name: value for name, value in values.items() if name not in ("step", *_ACCOUNT)}
            named |= {f"{name}/{source}": value for source, of in by_source.items() for name, value in of.items()}
            numbers = {name: value for name, value in named.items() if isinstance(value, int | float)}
            for tracker in self._trackers:
                tracker.log(values["step"], numbers)

    def predictions(self, by_split: Callable[[], dict[str, list[dict[str, Any]]]]) -> None:
        """Write predictions-SPLIT.jsonl: what the last evaluation said of each example."""
        if not self._speaks:
            return
        for split, judged in by_split().items():
            path = self._run_dir / f"predictions-{split}.jsonl"
            temporary = path.with_name(f".{path.name}.new")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in judged)
            temporary.replace(path)

    def ledger(self, step: int, rows: tuple[int, int], digest: str, *, skipped: bool = False) -> None:
        """Append the step's rows [first, last] and digest to ledger.jsonl."""
        if self._speaks:
            self._ledger.append(LedgerEntry(step, rows, digest, skipped))

    def say(self, message: str) -> None:
        """One line for the log."""
        if self._speaks:
            print(time.strftime("%H:%M:%S"), message, flush=True)

    def _account(self) -> dict[str, Any]:
        """Where the time of this attempt went so far, see `dstrain.rundir.wall_time`."""
        seconds = self._wall_time.seconds()
        return {
            "time_unix": time.time(),
            "attempt": self._attempt,
            "from_step": self._from_step,
            "attempt_seconds": seconds,
        }

    def _time(self) -> dict[str, Any]:
        """The same, and of all attempts so far; `goodput` is the share of computing in it."""
        account = self._account()
        if self._seconds_before is None:
            before = seconds_before(self._run_dir, self._attempt, self._started_unix, self._from_step)
            self._seconds_before = before
        here = account["attempt_seconds"]
        run = {part: round(value + here.get(part, 0.0), 3) for part, value in self._seconds_before.items()}
        return {**account, "run_seconds": run, "goodput": run["computing"] / max(sum(run.values()), 1e-3)}

    def _write_status(self) -> None:
        self._status_written = time.monotonic()
        temporary = self._status_path.with_name(f".{self._status_path.name}.new")
        with contextlib.suppress(OSError):  # a full disk ends a run at its next save, with a reason; not here
            temporary.write_text(json.dumps(self._status | self._account()))
            temporary.replace(self._status_path)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that this rank has used so far: of the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in KiB
