"""What a run's folder tells about its past: which rows a step had, what it logged, where its weights can be had."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.checkpoint.load import Source
from dstrain.checkpoint.manifest import Manifest, committed, step_of
from dstrain.checkpoint.verify import describe_skipped, require_known_format, verify
from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, read_ledger
from dstrain.errors import UserError
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.report.runs import read_metrics


@dataclass(frozen=True)
class StepHistory:
    """How a run came to a step. `entries` are the ledger's from the step after `source` up to the one in question."""

    source: Source | None  # the newest sound checkpoint before the step; None where only the run's beginning is left
    entries: list[LedgerEntry]  # in the order in which they were trained; the last one is the step in question
    skipped: list[str]  # checkpoints passed over, and why


def run_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run's folder. Raises UserError where there is no run."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is no run's folder: it has no recipe.yaml; give what `dstrain run` wrote into")
    return load_recipe(file).recipe


def run_ledger(run_dir: Path) -> Path:
    """The ledger of a run that has made a step. Raises UserError."""
    path = run_dir / LEDGER_NAME
    if not path.is_file() or next(read_ledger(path), None) is None:
        raise UserError(f"{run_dir}: this run has made no step yet; run it first")
    return path


def step_history(run_dir: Path, step: int) -> StepHistory:
    """How a run came to `step`: the nearest sound checkpoint before it, and the steps from there on.

    Raises:
        UserError: the run has not made this step, or steps in between are missing from the ledger.
        OtherFormatError: the nearest checkpoint is of another version of dstrain.
    """
    path = run_ledger(run_dir)
    last = next(read_ledger(path)).step
    if not 1 <= step <= last:
        raise UserError(f"--step {step}: {run_dir} has made the steps 1 to {last:,}; give one of them")
    source, skipped = _nearest_checkpoint(run_dir, step)
    start = 0 if source is None else source.manifest.step
    entries: list[LedgerEntry] = []
    for entry in read_ledger(path):
        if entry.step <= start:
            break
        if entry.step <= step:
            entries.append(entry)
    entries.reverse()
    if [entry.step for entry in entries] != list(range(start + 1, step + 1)):
        missing = sorted(set(range(start + 1, step + 1)) - {entry.step for entry in entries})
        raise UserError(f"{path} lacks step {missing[0]}; restore it from a copy, or give a step before that")
    return StepHistory(source, entries, skipped)


def _nearest_checkpoint(run_dir: Path, step: int) -> tuple[Source | None, list[str]]:
    """The newest sound checkpoint of a step before `step`, and a line about each that was passed over."""
    skipped: list[str] = []
    for folder in committed(run_dir):
        if (step_of(folder) or 0) >= step:
            continue
        require_known_format(folder)
        problems = verify(folder)
        if not problems:
            return Source(folder, Manifest.read(folder), skipped), skipped
        skipped.append(describe_skipped(folder, problems))
    return None, skipped


@dataclass(frozen=True)
class LoggedStep:
    """What a run logged of a step (None: nothing), and of how many ranks it was."""

    metrics: dict[str, Any] | None
    world_size: int


def logged_step(run_dir: Path, step: int) -> LoggedStep:
    """What was logged of a step. Where it was not, the number of ranks is that of the next step that was.

    After the last logged step, it is that of the run's newest attempt.
    """
    file = run_dir / "metrics.jsonl"
    training = [entry for entry in (read_metrics(file).training if file.is_file() else []) if "rank_losses" in entry]
    at_or_after = next((entry for entry in training if entry["step"] >= step), None)
    if at_or_after is not None:
        return LoggedStep(at_or_after if at_or_after["step"] == step else None, len(at_or_after["rank_losses"]))
    return LoggedStep(None, _newest_world_size(run_dir))


def _newest_world_size(run_dir: Path) -> int:
    for path in sorted((run_dir / "status").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return int(json.loads(path.read_text())["world_size"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(f"{run_dir}: nothing tells how many ranks this run had; give --world")
