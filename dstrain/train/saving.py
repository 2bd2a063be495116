"""Saves of a run: a thread copies, writes, hashes, votes and commits while training goes on.

    training   … step 8 ─┬─ forward, backward ─┬─ step 9 ─── step 10 ─── … ─── step 16 ─┬─ …
    thread               └─ copy ──────────────┴─ stage, write, vote, commit, latest, prune ─┘

All that is saved changes at one place, where the optimizer steps. So the copy is made beside the forward and backward
passes of the next step, and only where it takes longer than these does training wait for it.

One save at a time: the next one, a stop and the end wait for the one under way, so that there is one copy at most. The
votes have a process group of their own: two threads of a rank in one group would not keep the order of its collectives.
A group rather than votes in files or in the store: a rank that dies closes its connections, and nobody waits for it.

With `checkpoint.async: false` nothing is copied, and training waits until the checkpoint is there.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from dstrain.base.phases import RankPhase
from dstrain.checkpoint.commit import Committed, commit, conclude
from dstrain.checkpoint.host_buffers import HostBuffers
from dstrain.checkpoint.retention import Retention
from dstrain.errors import CheckpointError
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import Task
from dstrain.train.reporting import Reporter
from dstrain.train.state import Snapshot, TrainState, take_snapshot

RETRY_AFTER_SECONDS = 5.0
# In these rank 0 works, and the others wait for its vote.
_OF_RANK_0 = (RankPhase.SAVE_STAGE, RankPhase.SAVE_COMMIT, RankPhase.SAVE_LATEST)
_ORDER = (  # (phase, whether the rank waits in it for rank 0), as they come to an end
    (RankPhase.SAVE_COPY, False),
    (RankPhase.SAVE_STAGE, False),
    (RankPhase.SAVE_STAGE, True),
    (RankPhase.SAVE_WRITE, False),
    (RankPhase.SAVE_VOTE, False),
    (RankPhase.SAVE_COMMIT, False),
    (RankPhase.SAVE_RENAME, False),
    (RankPhase.SAVE_COMMIT, True),
    (RankPhase.SAVE_LATEST, False),
    (RankPhase.SAVE_PRUNE, False),
    (RankPhase.SAVE_LATEST, True),
)
Result = TypeVar("Result")


class Saving:
    """The saves of one rank. All calls but `look` are collective; training's thread makes them."""

    def __init__(self, runtime: Runtime, task: Task, run_dir: Path, report: Reporter) -> None:
        self._runtime, self._task, self._run_dir, self._report = runtime, task, run_dir, report
        self._retention = Retention.of(runtime.recipe)
        self._buffers = HostBuffers(runtime.device) if runtime.recipe.checkpoint.async_ else None
        self._save: _Save | None = None
        self._training_step = 0

    @property
    def idle(self) -> bool:
        """Whether no save is under way."""
        return self._save is None

    def begin(self, state: TrainState, scores: dict[str, float]) -> None:
        """Save the state as it is now, after waiting for the save before it. `scores`: of an evaluation at this step.

        Raises:
            CheckpointError: that one has failed; or this one, where training waits for it.
        """
        began, self._training_step = time.perf_counter(), state.step
        self.finish()
        self._report.phase(RankPhase.SAVE_BEGIN, within=0.0)
        snapshot = take_snapshot(self._runtime, self._task, state, scores)
        self._save = _Save(self._runtime, self._run_dir, snapshot, self._retention, self._report, self._buffers)
        self._save.stall_seconds = time.perf_counter() - began
        if self._buffers is None:
            self.finish()

    def let_step(self) -> None:
        """Wait, before the optimizer steps, until what is to be saved has been copied."""
        if self._save is not None and not self._save.copied.is_set():
            began = time.perf_counter()
            self._report.phase(RankPhase.SAVE_COPY, within=0.0)
            self._save.copied.wait()
            self._save.stall_seconds += time.perf_counter() - began

    def look(self, step: int) -> bool:
        """Report, as training is about to go on from a step, what has become of the save under way.

        Returns:
            True: it has failed. `finish` raises the reason, on every rank.
        """
        save, self._training_step = self._save, step
        if save is None:
            return False
        self._read(save)
        if save.thread.is_alive():
            return False
        if save.failure is None:
            self.finish()
        return save.failure is not None

    def finish(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            CheckpointError: it has failed, also when it was tried again. The checkpoints before it are intact.
        """
        save, self._save = self._save, None
        if save is None:
            return
        while (phase := save.phases.get()) is not None:  # whoever waits is seen in the phase that is waited for
            self._report.phase(phase, within=save_progress(phase, self._runtime.rank))
        save.thread.join()
        self._read(save)
        if save.failure is not None:
            raise save.failure
        assert save.committed is not None
        self._report.say(f"saved {save.committed.folder}")
        stall = save.seconds if self._buffers is None else save.stall_seconds
        self._report.metrics(
            {
                "step": self._training_step,
                "saved_step": save.step,
                "save_bytes": save.committed.total_bytes,
                "save_seconds": save.seconds,
                "save_stall_seconds": stall,
            }
        )
        self._report.phase(
            RankPhase.SAVED,
            within=0.0,
            last_checkpoint_step=save.step,
            save_seconds=save.seconds,
            save_stall_seconds=stall,
            saving=None,
        )

    def _read(self, save: "_Save") -> None:
        while not save.notes.empty():
            self._report.say(save.notes.get())


def save_progress(phase: RankPhase, rank: int) -> float:
    """How far a rank is in a save, from 0 to 1: of several that stand still, the one least far is waited for."""
    return (_ORDER.index((phase, rank > 0 and phase in _OF_RANK_0)) + 1) / (len(_ORDER) + 1)


class _Save:
    """One save, from its snapshot on, in a thread of its own."""

    def __init__(
        self,
        runtime: Runtime,
        run_dir: Path,
        snapshot: Snapshot,
        retention: Retention,
        report: Reporter,
        buffers: HostBuffers | None,
    ) -> None:
        self._runtime, self._run_dir, self._snapshot, self._retention = runtime, run_dir, snapshot, retention
        self._report, self._buffers = report, buffers
        if buffers is not None:
            buffers.follow()
        self._began = time.perf_counter()
        self.step = snapshot.manifest.step
        self.phases: SimpleQueue[RankPhase | None] = SimpleQueue()  # as they begin; None: it is over
        self.notes: SimpleQueue[str] = SimpleQueue()  # for the log
        self.committed: Committed | None = None
        self.failure: BaseException | None = None
        self.seconds = 0.0
        self.stall_seconds = 0.0
        self.copied = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"save-{self.step}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            if self._buffers is not None:
                self._enters(RankPhase.SAVE_COPY)
                self._snapshot = replace(self._snapshot, pieces=self._buffers.copy(self._snapshot.pieces))
                self.copied.set()
            self.committed = self._tried(self._commit)
            self._tried(self._conclude)
        except BaseException as error:  # raised by `finish`, in training's thread
            self.failure = error
        finally:
            self.copied.set()
            self.seconds = time.perf_counter() - self._began
            self.phases.put(None)

    def _commit(self) -> Committed:
        return commit(self._runtime, self._run_dir, self._snapshot.pieces, self._snapshot.manifest, self._enters)

    def _conclude(self) -> None:
        assert self.committed is not None
        conclude(self._runtime, self.committed.folder, self._retention, self._enters)

    def _tried(self, part: Callable[[], Result]) -> Result:
        """Do it, and beside training once more after a failure. All ranks have the same votes, and so do the same."""
        if self._buffers is None:
            return part()
        try:
            return part()
        except CheckpointError as error:
            self.notes.put(f"step {self.step}, to be tried again in {RETRY_AFTER_SECONDS:.0f} s: {error}")
        time.sleep(RETRY_AFTER_SECONDS)
        return part()

    def _enters(self, phase: RankPhase) -> None:
        self.phases.put(phase)
        self._report.saving(phase)
