"""`--allow data-change`: a run goes on with other data than its newest checkpoint was trained on.

Weights, optimizer and step go on; the new data is read from its beginning, from the next data step on. Row numbers go
on as well, so that no mask is ever drawn twice. What changed, and where, stands in every later manifest.

The permission stands in the run's folder and names the data that may be left: it lasts until a checkpoint of the new
data is committed, however often the start fails, and not one change longer.
"""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstrain.base.durable import write_durably
from dstrain.base.storage import Place
from dstrain.checkpoint.identity import Identity, differences
from dstrain.checkpoint.manifest import Manifest, committed
from dstrain.recipe.difference import Difference

DATA_CHANGE = "data-change"  # what --allow takes
PERMISSION = "data-change.json"  # in the run's folder


def changes(manifest: Manifest, identity: Identity) -> list[Difference]:
    """In what data differs from what a checkpoint was trained on, as far as that was trained on."""
    return differences(manifest.identity, identity, manifest.data_origin[0], manifest.data_step)


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
    data_changes = [change for folder in committed(run)[:1] for change in Manifest.read(folder).data_changes]
    steps = [change["step"] for change in data_changes]
    if isinstance(run, Path):
        steps.append(permitted(run).get("step", -1))
    return max(steps, default=-1)


def on_other_data(manifest: Manifest, permission: dict[str, Any], identity: Identity) -> Manifest:
    """The manifest of a checkpoint as if it were of other data; as it is, where the data is the same or not permitted.

    Args:
        manifest: of the checkpoint.
        permission: see `permitted`.
        identity: of the data to go on with.
    """
    changed = changes(manifest, identity)
    may_leave = permission.get("identity") == _digest(manifest.identity)
    if not changed or not may_leave or not all(difference.is_of_data for difference in changed):
        return manifest
    change = {
        "step": manifest.step,
        "data_step": manifest.data_step,
        "first_row": manifest.next_row,
        "changed": [difference.to_json() for difference in changed],
    }
    return replace(
        manifest,
        identity=identity,
        best=None,  # of another evaluation, perhaps
        plateau=None if manifest.plateau is None else manifest.plateau | {"value": None, "since": 0},
        data_changes=[*manifest.data_changes, change],
    )


def _digest(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
