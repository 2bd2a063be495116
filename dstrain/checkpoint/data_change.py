"""`--allow data-change`: a run goes on with other data than its newest checkpoint was trained on.

Weights, optimizer and step go on; the new data is read from its beginning, unless only batch or masks have changed. Row
numbers go on as well, so that no mask is ever drawn twice. What changed, and where, stands in every later manifest.

The permission stands in the run's folder and names the data that may be left: it lasts until a checkpoint of the new
data is committed, however often the start fails, and not one change longer.
"""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstrain.checkpoint.durable import write_durably
from dstrain.checkpoint.manifest import Manifest, committed
from dstrain.checkpoint.store import Place

DATA_CHANGE = "data-change"  # what --allow takes
PERMISSION = "data-change.json"  # in the run's folder
FIXED = ("task", "labels", "base")  # of an identity: the head is made for them, and adapters for their base
ORDER = ("corpus", "tokenizer", "data.lanes", "data.seed", "data.shuffle_window")  # what a cursor is a place in


def permit(run_dir: Path) -> None:
    """Let the run leave the data of its newest checkpoint. Nothing to do where there is no checkpoint."""
    folders = committed(run_dir)
    if folders:
        manifest = Manifest.read(folders[0])
        record = {"step": manifest.step, "identity": _digest(manifest.identity), "time_unix": time.time()}
        write_durably(run_dir / PERMISSION, json.dumps(record) + "\n")


def permitted(run_dir: Path) -> dict[str, Any]:
    """The step and the digest of the identity that may be left; empty where none may."""
    try:
        record: dict[str, Any] = json.loads((run_dir / PERMISSION).read_text())
    except (OSError, ValueError):
        return {}
    return record


def last_step_of_other_data(run: Place) -> int:
    """The step after which a run went on, or may go on, with the data of its recipe; -1 where there was no other."""
    changes = [change for folder in committed(run)[:1] for change in Manifest.read(folder).data_changes]
    steps = [change["step"] for change in changes]
    if isinstance(run, Path):
        steps.append(permitted(run).get("step", -1))
    return max(steps, default=-1)


def on_other_data(
    manifest: Manifest, permission: dict[str, Any], identity: dict[str, Any], lanes: int, batch_rows: int
) -> Manifest:
    """The manifest of a checkpoint as if it were of other data; as it is, where the data is the same or not permitted.

    Args:
        manifest: of the checkpoint.
        permission: see `permitted`.
        identity: of the data to go on with.
        lanes: that the data is read in.
        batch_rows: rows of a global batch from here on.
    """
    changed = differences(manifest.identity, identity)
    names = {line.split(" was ")[0] for line in changed}
    if not changed or names & set(FIXED) or permission.get("identity") != _digest(manifest.identity):
        return manifest
    first_unused_row = manifest.data_step * manifest.identity["global_batch_rows"]
    data_step = -(-first_unused_row // batch_rows)
    keeps_place = not names & set(ORDER) and len(manifest.cursors) == lanes
    change = {"step": manifest.step, "data_step": data_step, "changed": changed}
    return replace(
        manifest,
        identity=identity,
        data_step=data_step,
        cursors=manifest.cursors if keeps_place else [[0, 0, 0]] * lanes,
        best=None,  # of another evaluation, perhaps
        plateau=None if manifest.plateau is None else manifest.plateau | {"value": None, "since": 0},
        data_changes=[*manifest.data_changes, change],
    )


def differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """Lines such as `data.seed was 1, is 2`, sorted; empty where two identities are equal."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = saved.keys() | now.keys()
        return sorted(
            line for key in keys for line in differences(saved.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        )
    return [] if saved == now else [f"{name} was {saved!r}, is {now!r}"]


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
