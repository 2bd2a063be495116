"""One node's watch over its ranks: their status for everybody to read, and an end to the one that hangs.

Every few seconds `status/nodes/node-NNNNN.json` says what each rank of this node does, and since when: one small file
for a node, whatever the number of its ranks.

When one rank hangs, all others soon wait for it. Waiting looks the same from outside, so a rank is blamed only if it is

    stopped      its process is, by SIGSTOP or a debugger
    by itself    in a phase in which it waits for no other rank: the next rows come from its own data process
    behind       it has begun fewer phases than every other rank, of all nodes, and none of them moves

What ranks of other nodes do is taken from those nodes' statuses, and only once all of this one's stand still.

Then py-spy reads where it stands, all ranks of the node write their stacks into their logs (and NCCL's flight recorder
its last collectives), and the blamed one is killed: the rest is as after any other failure.
"""

import contextlib
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstrain.base.environment import flight_recorder_pipes
from dstrain.base.phases import RankPhase
from dstrain.diagnose import stacks
from dstrain.diagnose.evidence import hang_file
from dstrain.diagnose.failure import Hang
from dstrain.diagnose.flight_recorder import have_recorded
from dstrain.errors import UserError
from dstrain.recipe.load import load_recipe
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.heartbeat import Heartbeat, read_heartbeats
from dstrain.rundir.run_folder import attempt_folder, node_status_folder, read_json

STACKS_SECONDS = 1.0  # for all threads' stacks to be written
STATUS_EVERY_SECONDS, RARELY_SECONDS = 2.0, 10.0  # between two statuses of a node: of a few nodes, of very many
_NODES_A_SECOND = 10  # that write one, on a disk that all share
_LOOK_EVERY_SECONDS = 1.0
_LEAST_SAMPLES, _KEPT_SAMPLES = 3, 60  # at one a second at most, the last minute


def hanging(
    heartbeats: Sequence[Heartbeat],
    now: float,
    limit_seconds: float,
    elsewhere: Callable[[], Sequence[float] | None] = list,
) -> Heartbeat | None:
    """The rank of this node to blame for standing still, if there is one. Pure; see the module's docstring.

    Args:
        heartbeats: of this node's ranks.
        now: by the clock that they go by.
        limit_seconds: how long a rank may stand still.
        elsewhere: how many phases each rank of the other nodes has begun; None where one of them is not known to
            stand still. Called only if that decides.
    """
    late = [heartbeat for heartbeat in heartbeats if now - heartbeat.monotonic > limit_seconds]
    for suspects in (
        [beat for beat in late if beat.is_stopped],
        [beat for beat in late if beat.phase.waits_for_no_rank],
    ):
        if suspects:
            return min(suspects, key=lambda heartbeat: heartbeat.monotonic)
    if late and len(late) == len(heartbeats) and (counts := elsewhere()) is not None:
        behind, *others = sorted(late, key=lambda heartbeat: heartbeat.count)
        ahead = [*(heartbeat.count for heartbeat in others), *counts]
        if ahead and behind.count < min(ahead):
            return behind
    return None


class Pace:
    """How long a rank's steps take, and how much of that is its own: medians of about the last minute."""

    def __init__(self) -> None:
        self._last: Heartbeat | None = None
        self._samples: deque[tuple[float, float]] = deque(maxlen=_KEPT_SAMPLES)  # (own, whole) seconds for a step

    def observe(self, heartbeat: Heartbeat) -> None:
        """Take in the rank's newest heartbeat."""
        last = self._last
        if last is None or heartbeat.step > last.step:
            if last is not None and last.step > 0:  # the first step is not like the others
                steps = heartbeat.step - last.step
                own, whole = heartbeat.own_seconds - last.own_seconds, heartbeat.monotonic - last.monotonic
                self._samples.append((own / steps, whole / steps))
            self._last = heartbeat

    def as_json(self) -> dict[str, float | None]:
        """`own_step_seconds` and `step_seconds`; None as long as there are too few steps to tell."""
        own, whole = zip(*self._samples, strict=True) if len(self._samples) >= _LEAST_SAMPLES else (None, None)
        return {
            "own_step_seconds": None if own is None else round(statistics.median(own), 4),
            "step_seconds": None if whole is None else round(statistics.median(whole), 4),
        }


def watch(run_dir: Path, attempt: int, ranks: Sequence[int], node: int = 0, nodes: int = 1) -> "Watch | None":
    """Watch `ranks`, which this process starts, as the recipe says; None without a recipe that can be read."""
    every = min(max(STATUS_EVERY_SECONDS, nodes / _NODES_A_SECOND), RARELY_SECONDS)
    with contextlib.suppress(UserError, OSError):
        recipe = load_recipe(run_dir / "recipe.yaml", check_files=False).recipe
        return Watch(run_dir, attempt, ranks, recipe.hang_timeout_seconds, node, nodes, every)
    return None


class Watch:
    """Watches the ranks that this process has started, in a thread."""

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        ranks: Sequence[int],
        limit_seconds: float,
        node: int = 0,
        nodes: int = 1,
        status_every_seconds: float = STATUS_EVERY_SECONDS,
    ) -> None:
        self._status_every_seconds = status_every_seconds
        self._node, self._nodes, self._attempt = node, nodes, attempt
        self._folder, self._limit = attempt_folder(run_dir, attempt), limit_seconds
        self._status_file = node_status_folder(run_dir) / _file_name(node)
        self._status: dict[str, Any] = {"attempt": attempt, "node": node, "host": socket.gethostname()}
        self._paces = {rank: Pace() for rank in ranks}
        self._seen: set[int] = set()
        self._began = self._written = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()
        self._write([], is_over=True)

    def _follow(self) -> None:
        self._write([])
        while not self._ended.wait(min(_LOOK_EVERY_SECONDS, self._limit / 4)):
            heartbeats = read_heartbeats()
            for heartbeat in heartbeats:
                self._paces.setdefault(heartbeat.rank, Pace()).observe(heartbeat)
            is_due = time.monotonic() - self._written >= self._status_every_seconds
            if is_due:
                self._write(heartbeats)
            elsewhere = self._counts_elsewhere if is_due else lambda: None  # no more often than they are written
            blamed = hanging(heartbeats, time.monotonic(), self._limit, elsewhere)
            if blamed is not None:
                self._write(heartbeats)
                self._end(blamed, heartbeats)
                return

    def _counts_elsewhere(self) -> list[float] | None:
        """How many phases the ranks of the other nodes have begun; None unless all stand still, and may be waiting."""
        counts = []
        for node in set(range(self._nodes)) - {self._node}:
            status = read_json(self._status_file.with_name(_file_name(node)))
            if status.get("attempt") != self._attempt:
                return None
            for rank in status["ranks"]:
                is_late = "count" in rank and rank["seconds"] > self._limit
                if (
                    not is_late or rank["is_stopped"] or RankPhase(rank["phase"]).waits_for_no_rank
                ):  # its own agent blames it
                    return None
                counts.append(rank["count"])
        return counts

    def _write(self, heartbeats: Sequence[Heartbeat], *, is_over: bool = False) -> None:
        """The node's status, as a whole. A disk that is full at the moment costs no more than that."""
        self._written = now = time.monotonic()
        alive = {heartbeat.rank: heartbeat for heartbeat in heartbeats}
        self._seen |= alive.keys()
        ranks = []
        for rank, pace in sorted(self._paces.items()):
            if (heartbeat := alive.get(rank)) is not None:
                known = {
                    "pid": heartbeat.pid,
                    "phase": heartbeat.phase,
                    "step": heartbeat.step,
                    "is_stopped": heartbeat.is_stopped,
                }
                known |= {"count": heartbeat.count, "seconds": round(now - heartbeat.monotonic, 1)}
                ranks.append({"rank": rank, **known, **pace.as_json()})
            else:
                phase = RankPhase.ENDED if is_over or rank in self._seen else RankPhase.STARTING
                ranks.append({"rank": rank, "pid": None, "phase": phase, "seconds": round(now - self._began, 1)})
        with contextlib.suppress(OSError):
            write_json(
                self._status_file, {**self._status, "is_over": is_over, "time_unix": time.time(), "ranks": ranks}
            )

    def _end(self, blamed: Heartbeat, heartbeats: Sequence[Heartbeat]) -> None:
        """Have everything written down that can be known, then kill the rank."""
        seconds = time.monotonic() - blamed.monotonic
        frames, text = _stack(blamed)
        for heartbeat in heartbeats:
            have_recorded(flight_recorder_pipes(), heartbeat.rank)
            _send(heartbeat.pid, signal.SIGUSR2)
        self._ended.wait(STACKS_SECONDS)
        if not frames:
            logs = (self._folder / "logs").glob(f"*/rank-{blamed.rank:05d}.log")
            frames = next((found for log in logs if (found := stacks.in_log(log))), ())
        hang = Hang(blamed.phase, round(seconds, 1), blamed.is_stopped, blamed.step, tuple(frames))
        content = {**asdict(hang), "rank": blamed.rank, "time_unix": time.time()}
        with contextlib.suppress(OSError):
            file = hang_file(self._folder, blamed.rank)
            write_json(file, content)
            file.with_suffix(".txt").write_text(text)
        _send(blamed.pid, signal.SIGKILL)


def _file_name(node: int) -> str:
    return f"node-{node:05d}.json"


def _stack(blamed: Heartbeat) -> tuple[tuple[str, ...], str]:
    """The innermost frames of the thread that hangs, and the stacks of all, also of the processes that it has started.

    In a phase in which a rank waits for its data process, that one is what hangs.
    """
    try:
        helpers = stacks.children(blamed.pid)
    except OSError:
        helpers = []
    found = {pid: stacks.spied(pid) for pid in (blamed.pid, *helpers)}
    first = (*helpers, blamed.pid) if blamed.phase.waits_for_no_rank and not blamed.is_stopped else (blamed.pid,)
    frames = next((found[pid][0].frames for pid in first if found[pid]), ())
    return stacks.shortened(frames), "\n".join(stacks.as_text(pid, threads) for pid, threads in found.items())


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
