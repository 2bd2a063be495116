"""An account of every row of a run, over all attempts: each was consumed exactly once up to the newest checkpoint.

The ledger is read backwards, in constant memory. A line counts when its step is below all steps read so far. What a
line that does not count means depends on its rows:

    at or above those of the counting line before it (later in the file)   made again after a restart: history
    below them                                                             skipped, or dropped by a rollback

Dropped rows must fill the gap between two counting lines without a hole. Each was skipped by the recipe, as its line
says, or a rollback to that very step stands in `metrics.jsonl`: a gap alone would be rows that a faulty resume lost.
Where a run went on with other data, that stands there too; another batch may have left row numbers in between unused.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.storage import Place
from dstrain.checkpoint.manifest import MANIFEST, Manifest, OtherFormatError, committed, newest_manifest
from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, compare_ledgers, read_all_backwards, read_ledger
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, CheckpointError, CorpusError
from dstrain.proof.documents import account_of_documents, documents_text
from dstrain.recipe.difference import Difference

PROBLEMS_KEPT = 20  # the first ones of a run; a broken ledger has no end of them
STRETCHES_KEPT = 1000  # of rolled-back rows; a run makes a handful

Rows = tuple[int, int]  # first and last


@dataclass(frozen=True)
class Dropped:
    """Rows between two steps that no step was made of: skipped by the recipe, or dropped by a rollback."""

    rows: Rows
    after_step: int
    rolled_back: bool


@dataclass(frozen=True)
class DataChange:
    """Where a run went on with other data, and what differs."""

    after_step: int
    first_row: int  # of the new data
    changed: tuple[Difference, ...]


@dataclass
class Account:
    """What became of the rows of a run. `problems` is empty if each was consumed exactly once, or rolled back."""

    ledger: str
    first_step: int
    last_step: int
    rows: Rows
    checkpoint_step: int | None  # up to which it is proved
    repeated_rows: int = 0  # made again after restarts
    repeated_steps: int = 0
    data_changes: list[DataChange] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)  # in the order of the run
    problems: list[str] = field(default_factory=list)  # likewise


@dataclass(frozen=True)
class Saved:
    """Where the newest checkpoint stands: after its step, the data goes on with `next_row`."""

    step: int
    next_row: int
    folder: Place
    began: tuple[int, int] = (0, 0)  # the step and the next row of an imported run's first checkpoint


def account(run_dir: Path) -> Account:
    """Account for all rows of a run.

    Raises:
        CorpusError: no ledger, an empty or a damaged one.
        CheckpointError: the newest checkpoint's manifest cannot be read.
    """
    path = run_dir / LEDGER_NAME
    metrics = run_dir / "metrics.jsonl"
    return account_of_ledger(path, newest_saved(run_dir, path), rollbacks_to(metrics), data_changes(metrics))


def account_of_ledger(
    path: Path, saved: Saved | None, rollbacks: set[int], changes: Sequence[DataChange] = ()
) -> Account:
    """The same from its parts.

    Args:
        path: the ledger.
        saved: the newest checkpoint.
        rollbacks: the steps that the run went back to.
        changes: where it went on with other data.
    """
    begins = {change.after_step: change.first_row for change in changes}
    lines = read_all_backwards(path)
    newest = last = next(lines, None)
    while last is not None and not last[1]:  # skipped, and the run ended there
        last = next(lines, None)
    if newest is None or last is None:
        raise CorpusError(f"{path}: no steps in it; give the folder of a run that has made a step")
    later = last[0]  # the counting line read last: the one that follows in the run
    lowest = later.rows[0]  # of all rows that are accounted for
    rolled_back = False  # some of the dropped rows
    last_skipped: int | None = None  # of the skipped ones that end where a counting line may begin
    rows_end = newest[0].rows[1]
    found = Account(str(path), 1, later.step, (0, rows_end), saved.step if saved else None, data_changes=list(changes))
    problems = _at_checkpoint(later, saved, rows_end)
    if later.rows[1] < rows_end:
        found.dropped.append(Dropped((later.rows[1] + 1, rows_end), later.step, rolled_back=False))
    for entry, counts in lines:
        if counts:
            problems += _between(entry, later, lowest) if begins.get(entry.step) != lowest else []
            if rolled_back and entry.step not in rollbacks:
                problems.append(_without_rollback(lowest, later, entry.step))
            problems += _at_checkpoint(entry, saved, entry.rows[1] if last_skipped is None else last_skipped)
            _note_dropped(found, lowest, later, entry.step, rolled_back)
            later, lowest, rolled_back, last_skipped = entry, entry.rows[0], False, None
        elif entry.rows[1] + 1 == lowest and begins.get(later.step - 1) != lowest:
            lowest, rolled_back = entry.rows[0], rolled_back or not entry.skipped
            last_skipped = (last_skipped or entry.rows[1]) if entry.skipped else None
        else:
            found.repeated_rows += entry.rows[1] - entry.rows[0] + 1
            found.repeated_steps += 1
        del problems[: -2 * PROBLEMS_KEPT]  # those of the earliest steps come last
    first_step, first_row = saved.began if saved else (0, 0)
    if later.step != first_step + 1 or lowest != first_row:
        problems.append(
            f"the ledger begins at step {later.step} with row {lowest}, not at step {first_step + 1} with row "
            f"{first_row}"
        )
    elif rolled_back and first_step not in rollbacks:  # where there is no checkpoint, nothing rolls back to
        problems.append(_without_rollback(lowest, later, first_step))
    _note_dropped(found, lowest, later, first_step, rolled_back)
    if saved is not None and saved.step > found.last_step:
        problems.insert(0, f"{saved.folder} is of step {saved.step}, but the ledger ends at step {found.last_step}")
    found.first_step, found.rows = later.step, (lowest, rows_end)
    found.dropped.reverse()
    found.problems = problems[::-1][:PROBLEMS_KEPT]
    return found


def _note_dropped(found: Account, lowest: int, later: LedgerEntry, after_step: int, rolled_back: bool) -> None:
    if lowest < later.rows[0] and len(found.dropped) < STRETCHES_KEPT:
        found.dropped.append(Dropped((lowest, later.rows[0] - 1), after_step, rolled_back))


def _without_rollback(lowest: int, later: LedgerEntry, step: int) -> str:
    return (
        f"rows {lowest} to {later.rows[0] - 1} were dropped between steps {step} and {later.step}, but metrics.jsonl "
        f"has no rollback to step {step}"
    )


def _between(earlier: LedgerEntry, later: LedgerEntry, lowest: int) -> list[str]:
    """What is wrong between two counting lines; `lowest` is the first row that the later one or a dropped one has."""
    if earlier.step + 1 != later.step:
        return [f"step {later.step} follows step {earlier.step}"]
    if lowest <= earlier.rows[1]:
        return [f"rows {lowest} to {earlier.rows[1]} were consumed in step {earlier.step} and again after it"]
    if lowest > earlier.rows[1] + 1:
        return [
            f"rows {earlier.rows[1] + 1} to {lowest - 1} were never consumed: step {earlier.step} ends at row "
            f"{earlier.rows[1]}, step {later.step} starts at row {later.rows[0]}"
        ]
    return []


def _at_checkpoint(entry: LedgerEntry, saved: Saved | None, last_skipped: int) -> list[str]:
    """Whether the checkpoint of a step goes on after its last row, or after rows up to `last_skipped`."""
    if saved is None or saved.step != entry.step or entry.rows[1] < saved.next_row <= last_skipped + 1:
        return []
    return [f"{saved.folder} goes on with row {saved.next_row}, but step {entry.step} ended at row {entry.rows[1]}"]


def newest_saved(run_dir: Path, ledger: Path) -> Saved | None:
    """The newest checkpoint. Beyond the ledger's end only one that verifies: a resume passed over the others."""
    last = next((entry.step for entry in read_ledger(ledger)), 0)
    for folder in committed(run_dir):
        if not (folder / MANIFEST).exists():
            continue
        try:
            manifest = Manifest.read(folder)
        except OtherFormatError:
            raise
        except CheckpointError:
            continue  # a resume passes over it as well
        if manifest.step <= last or _is_sound(folder):
            began = manifest.origin or {"step": 0, "first_row": 0}
            return Saved(manifest.step, manifest.next_row, folder, (began["step"], began["first_row"]))
    return None


def _is_sound(folder: Place) -> bool:
    from dstrain.checkpoint.verify import verify  # takes seconds to import

    return not verify(folder)


def rollbacks_to(metrics: Path) -> set[int]:
    """The steps that a run went back to."""
    if not metrics.is_file():
        return set()
    with metrics.open(encoding="utf-8") as lines:
        return {json.loads(line)["rolled_back_to"] for line in lines if '"rolled_back_to"' in line}


def data_changes(metrics: Path) -> list[DataChange]:
    """Where a run went on with other data, the last time for each step."""
    if not metrics.is_file():
        return []
    with metrics.open(encoding="utf-8") as lines:
        logged = [json.loads(line) for line in lines if '"data_changed"' in line]
    by_step = {}
    for change in logged:
        changed = tuple(map(Difference.from_json, change["data_changed"]))
        by_step[change["step"]] = DataChange(change["step"] - 1, change["first_row"], changed)
    return list(by_step.values())


# ---------------------------------------------------------------- the command


def ledger_command(args: Namespace) -> int:
    """`dstrain ledger RUN [OTHER]`: account for all rows; compare with another run. Exit code 1 if that fails."""
    path = _ledger_of(args.run)
    found = account(path.parent)
    report: dict[str, Any] = asdict(found)
    lines, good = account_lines(found), not found.problems
    if good:
        dropped = [dropped.rows for dropped in found.dropped]
        documents = account_of_documents(path.parent, newest_manifest(path.parent), dropped)
        if documents is not None:
            lines += documents_text(documents) + [f"  problem      {problem}" for problem in documents.problems]
            report["documents"] = asdict(documents)
            good = not documents.problems
    if args.other is not None:
        other = _ledger_of(args.other)
        comparison = compare_ledgers(path, other)
        report |= {"other": str(other), **asdict(comparison)}
        if not comparison.common_steps:
            verdict = "no step in common"
        elif comparison.first_difference is None:
            verdict = f"the same rows in all {comparison.common_steps} common steps"
        else:
            verdict = (
                f"other rows from step {comparison.first_difference} on, of {comparison.common_steps} common steps"
            )
        good = good and comparison.common_steps > 0 and comparison.first_difference is None
        lines.append(f"{other}: {verdict}")
    print(json.dumps(report) if args.json else "\n".join(lines))
    return EXIT_DONE if good else EXIT_FAILURE


def account_lines(found: Account) -> list[str]:
    """An account for people."""
    if found.checkpoint_step is None:
        proved = "there is no checkpoint yet"
    elif found.checkpoint_step >= found.last_step:
        proved = f"the checkpoint of step {found.checkpoint_step:,} goes on after the last of them"
    else:
        since = found.last_step - found.checkpoint_step
        proved = f"the newest checkpoint is of step {found.checkpoint_step:,}; {since:,} steps since"
    verdict = "each row consumed exactly once" if not found.problems else "not every row consumed exactly once"
    lines = [
        f"{found.ledger}: {verdict}",
        f"  steps        {found.first_step:,} to {found.last_step:,}, rows {found.rows[0]:,} to {found.rows[1]:,}",
        f"  checkpoint   {proved}",
    ]
    if found.repeated_steps:
        lines.append(f"  made again   {found.repeated_rows:,} rows of {found.repeated_steps:,} steps, after restarts")
    for dropped in found.dropped:
        what = "rolled back" if dropped.rolled_back else "skipped"
        lines.append(
            f"  {what:<11}  rows {dropped.rows[0]:,} to {dropped.rows[1]:,}, after step {dropped.after_step:,}"
        )
    lines += [
        f"  other data   from row {change.first_row:,} on, after step {change.after_step:,}: "
        f"{'; '.join(map(str, change.changed))}"
        for change in found.data_changes
    ]
    return [*lines, *(f"  problem      {problem}" for problem in found.problems)]


def _ledger_of(run: str) -> Path:
    path = Path(run) / LEDGER_NAME if Path(run).is_dir() else Path(run)
    if not path.is_file() or path.name != LEDGER_NAME:
        raise CorpusError(f"{path}: there is no ledger; give the folder of a run")
    return path
