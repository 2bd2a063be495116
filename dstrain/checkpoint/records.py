"""What was done with a run's checkpoints, for `ckpt ls`: when one was last found sound, where it was exported to.

`checkpoints/records.json`. A record belongs to one manifest, byte for byte: a step that is saved again has none. It is
a convenience, never a proof: nothing that loads a checkpoint looks at it. Retention
does not count what is found damaged.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dstrain.base.storage import Place, StoragePath
from dstrain.checkpoint.manifest import MANIFEST, checkpoints_of, run_of

RECORDS = "records.json"


@dataclass
class Record:
    """What is known of one checkpoint: time.time() of its last sound verification, folders it was exported to."""

    manifest: str
    verified_at: float | None = None
    found_damaged: bool = False  # by the last verification
    exports: list[str] = field(default_factory=list)


class Records:
    """The records of a run, by the name of the checkpoint."""

    def __init__(self, known: dict[str, Record]) -> None:
        self.known = known

    @classmethod
    def read(cls, run_dir: Place) -> "Records":
        """Empty where there are none, or none that can be read."""
        try:
            stored = json.loads((checkpoints_of(run_dir) / RECORDS).read_text(encoding="utf-8"))
            return cls({name: Record(**record) for name, record in stored.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls({})

    def of(self, folder: Place) -> Record:
        """The record of a checkpoint; an empty one if there is none, or only of an older checkpoint of its name."""
        manifest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        record = self.known.get(folder.name)
        return record if record is not None and record.manifest == manifest else Record(manifest)


def record_verified(folder: Place, at: float | None) -> None:
    """Note when a checkpoint was found sound; None: it was not."""
    records = Records.read(run_of(folder))
    record = records.of(folder)
    record.verified_at, record.found_damaged = at, at is None
    _write(folder, records, record)


def record_export(folder: Place, out: Path) -> None:
    """Note where a checkpoint was exported to."""
    records = Records.read(run_of(folder))
    record = records.of(folder)
    record.exports = [*(there for there in record.exports if there != str(out)), str(out)]
    _write(folder, records, record)


def _write(folder: Place, records: Records, record: Record) -> None:
    """Replace the file as a whole. A place that may only be read keeps no records."""
    folder = folder if isinstance(folder, StoragePath) else folder.resolve()
    records.known[folder.name] = record
    with contextlib.suppress(OSError):
        there = {entry.name for entry in folder.parent.iterdir()}
        text = json.dumps({name: asdict(known) for name, known in records.known.items() if name in there}, indent=1)
        if isinstance(folder, StoragePath):
            (folder.parent / RECORDS).write_text(text + "\n")
        else:
            temporary = folder.parent / f".{RECORDS}.new"
            temporary.write_text(text + "\n")
            temporary.replace(folder.parent / RECORDS)
