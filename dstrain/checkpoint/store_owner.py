"""Which run may write into a store: a lock as the one on a run's folder, for a place that several machines reach.

    RUN/store_owner.json        who this run is, kept for ever, and its present session
    STORE/owner.json            the same, while a supervisor of the run lives

The claim is made where there is none, in one request that fails if another one was faster. It is taken off when the
supervisor ends, and stays when that is killed: then the same run folder goes on all the same, and every other one is
refused until `dstrain ckpt release`. A claim proves nothing for good (a copied folder is the same run), so rank 0 looks
again before it removes anything there, and before it commits: whoever came last may, all others have lost the store.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dstrain.base.storage import Place, StoragePath
from dstrain.checkpoint.manifest import checkpoints_of
from dstrain.errors import CheckpointError

IN_STORE, IN_RUN = "owner.json", "store_owner.json"


@dataclass(frozen=True)
class StoreOwner:
    """One session of one run: what both files hold."""

    run: str  # made once for a run folder
    session: str  # made anew by every supervisor
    folder: str
    host: str
    process: int
    since_unix: float

    @classmethod
    def read(cls, path: Place) -> Self | None:
        """None where there is none. Raises CheckpointError where it cannot be read, or is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it, once no run writes there") from error

    def text(self) -> str:
        """The files' content."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_unix))
        return f"{self.folder} on {self.host} (process {self.process}, since {since})"


@contextmanager
def owned_store(run_dir: Path) -> Iterator[None]:
    """Hold the store that the recipe in a run's folder names; nothing where it names none. Hold the folder's lock too.

    Raises:
        CheckpointError: another run holds it.
    """
    store = checkpoints_of(run_dir)
    if not isinstance(store, StoragePath):
        yield
        return
    mine = claim(store, run_dir)
    try:
        yield
    finally:
        with contextlib.suppress(CheckpointError, OSError):  # then it stays, and this run folder may still go on
            if StoreOwner.read(store / IN_STORE) == mine:
                (store / IN_STORE).remove()


def claim(store: StoragePath, run_dir: Path) -> StoreOwner:
    """Make a store this run's, by the process that calls. Raises CheckpointError where it is another's."""
    before, there = StoreOwner.read(run_dir / IN_RUN), StoreOwner.read(store / IN_STORE)
    run = uuid.uuid4().hex if before is None else before.run
    place = str(run_dir.resolve()), socket.gethostname(), os.getpid()
    mine = StoreOwner(run, uuid.uuid4().hex, *place, time.time())
    if there is None or there.run == run:
        temporary = run_dir / f".{IN_RUN}.new"
        temporary.write_text(mine.text())
        temporary.replace(run_dir / IN_RUN)
        try:
            if there is None:
                (store / IN_STORE).create_text(mine.text())
            else:
                (store / IN_STORE).write_text(mine.text())
        except OSError as error:
            raise CheckpointError(f"{store / IN_STORE}: {error.strerror or error}") from error
        there = StoreOwner.read(store / IN_STORE)
    if there != mine:
        raise CheckpointError(
            f"{store} is in use by another run: {there}; stop that one first, or give another checkpoint.storage; if "
            f"it was killed, the same run folder may go on, and `dstrain ckpt release {store}` lets others in"
        )
    return mine


def require_owned(store: StoragePath, run_dir: Path) -> None:
    """Look again, before something is removed or committed there. Raises CheckpointError where it is another's now."""
    mine, there = StoreOwner.read(run_dir / IN_RUN), StoreOwner.read(store / IN_STORE)
    if mine != there:
        taken = "this run's claim was taken off it" if there is None else f"{there} has taken it"
        raise CheckpointError(f"{store} is not this run's any more: {taken}; stop the other one, and start this again")


def release(store: StoragePath) -> StoreOwner | None:
    """Take any run's claim off a store; returns it. Raises CheckpointError."""
    there = StoreOwner.read(store / IN_STORE)
    try:
        (store / IN_STORE).remove()
    except OSError as error:
        raise CheckpointError(f"{store / IN_STORE}: {error.strerror or error}") from error
    return there
