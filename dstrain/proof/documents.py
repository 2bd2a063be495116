"""An account of documents: per source the tokens that a run was trained on, and how many of its tokens how often.

Rows say nothing about documents. What ties them together is the law of the data (`data/layout.py`), so three things
have to hold: every line of the ledger is a global batch of the law; the tokens of those lines are those that the law
has read; and rows made anew by the law, of some steps, have the digests that the ledger has.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dstrain.checkpoint.identity import GlobalBatches
from dstrain.checkpoint.manifest import Manifest
from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, read_all_backwards
from dstrain.data.rows import digest_hex
from dstrain.data.stream import RowStream
from dstrain.errors import CorpusError, RecipeError
from dstrain.proof.coverage import Ranges, line_ranges, times_read, without
from dstrain.proof.training_data import OtherDataError, TrainingData
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe

PHASES_REMADE = 8  # at most: of each the first step
Rows = tuple[int, int]  # first and last


@dataclass(frozen=True)
class SourceAccount:
    """What a run was trained on of one source.

    `times_seen` has number of times → tokens of the corpus. It is exact but where `exact` is false: then batches that
    were passed over are too many to be looked up and count as seen, or an epoch's end in an enormous corpus as over.
    """

    source: str
    corpus: str  # digest
    corpus_tokens: int
    tokens: int  # trained on
    epochs: float
    passed_over: int  # tokens of batches that were skipped or rolled back
    times_seen: dict[int, int]
    exact: bool


@dataclass
class DocumentAccount:
    """The documents of a run since row `first_row`, with which the data that it has now began."""

    first_row: int = 0
    sources: list[SourceAccount] = field(default_factory=list)
    remade_steps: list[int] = field(default_factory=list)  # whose digests are those of the ledger
    problems: list[str] = field(default_factory=list)
    missing: str | None = None  # why there is no such account


def account_of_documents(run_dir: Path, manifest: Manifest | None, dropped: Sequence[Rows]) -> DocumentAccount | None:
    """Account for the documents of a run; None where its task reads no shards.

    Args:
        run_dir: the run's folder.
        manifest: of its newest checkpoint.
        dropped: the rows that no step was made of.

    Raises:
        CorpusError: a line of the ledger is damaged.
    """
    file = run_dir / "recipe.yaml"
    recipe = load_recipe(file, check_files=False).recipe if file.is_file() else None
    if not isinstance(recipe, PretrainingRecipe):
        return None
    try:
        data = TrainingData.of_run(run_dir, recipe, manifest)
        imported_at = manifest.origin["data_step"] if manifest is not None and manifest.origin is not None else 0
        return _account(run_dir / LEDGER_NAME, data, dropped, imported_at)
    except OtherDataError as error:
        return DocumentAccount(problems=[str(error)])
    except (CorpusError, RecipeError) as error:
        return DocumentAccount(missing=str(error))


def _account(ledger: Path, data: TrainingData, dropped: Sequence[Rows], imported_at: int) -> DocumentAccount:
    batches = GlobalBatches(data.identity, data.origin)
    found = DocumentAccount(first_row=data.origin[1])
    read_to, tokens, to_remake = data.origin[0], 0, dict[int, LedgerEntry]()
    for entry, counts in _own_lines(ledger, data.origin[1]):
        data_step = batches.step_of(entry.rows[0])
        rows = (batches.first_row(data_step), batches.first_row(data_step + 1) - 1)
        if entry.rows != rows:
            found.problems = [
                f"step {entry.step} has the rows {entry.rows[0]} to {entry.rows[1]}, where a global batch of this data "
                f"has {rows[0]} to {rows[1]}"
            ]
        read_to = max(read_to, data_step + 1)
        if counts:
            phase = data.layout.phase_at(data_step)
            tokens += (rows[1] - rows[0] + 1) * phase.spec.sequence_length
            to_remake[phase.number] = entry  # the first one of the phase, in the end
            to_remake.setdefault(-1, entry)  # the last one of all
    passed_over = [
        (batches.step_of(first), batches.step_of(last) + 1) for first, last in dropped if first >= data.origin[1]
    ]
    if imported_at > data.origin[0]:  # what came before was trained on elsewhere, if at all
        passed_over.insert(0, (data.origin[0], imported_at))
    found.sources = [_source(data, number, read_to, passed_over) for number in range(len(data.lanes))]
    by_law = sum(source.tokens for source in found.sources)
    if by_law != tokens and not found.problems:
        found.problems.append(f"the ledger's steps have {tokens:,} tokens, and {by_law:,} by the law of the data")
    if not found.problems:
        _remake(data, batches, to_remake, found)
    return found


def _own_lines(ledger: Path, first_row: int) -> Iterator[tuple[LedgerEntry, bool]]:
    """The lines of the data that the run has now, from the end."""
    return ((entry, counts) for entry, counts in read_all_backwards(ledger) if entry.rows[0] >= first_row)


def _source(data: TrainingData, number: int, read_to: int, passed_over: Sequence[tuple[int, int]]) -> SourceAccount:
    """What was read of a source until a data step, but for some ranges of data steps."""
    lanes, layout = data.lanes[number], data.layout
    read = layout.tokens_read(read_to)[number]
    skipped, parts = 0, list[Ranges]()
    counts, exact = times_read(lanes, read)
    for first, last in passed_over:
        begins, ends = (layout.tokens_read(step)[number] for step in (first, last))
        skipped += int((ends - begins).sum())
        parts += [line_ranges(lanes, int(lane), int(begins[lane]), int(ends[lane]))
                  for lane in np.flatnonzero(begins < ends)]  # fmt: skip
    left: Counter[int] | None = counts
    if parts:
        left = without(counts, lanes, read, Ranges.join(parts)) if exact else None
    trained = int(read.sum()) - skipped
    return SourceAccount(
        source=data.names[number],
        corpus=lanes.corpus.digest,
        corpus_tokens=lanes.line.tokens,
        tokens=trained,
        epochs=trained / lanes.line.tokens,
        passed_over=skipped,
        times_seen=dict(sorted((counts if left is None else left).items())),
        exact=exact and left is not None,
    )


def _remake(
    data: TrainingData, batches: GlobalBatches, entries: dict[int, LedgerEntry], found: DocumentAccount
) -> None:
    """Make the rows of some steps anew, and compare their digests with the ledger's."""
    for entry in sorted(entries.values(), key=lambda entry: entry.step)[-PHASES_REMADE - 1 :]:
        if entry.step in found.remade_steps:
            continue
        with RowStream(data.spec, 0, 1, first_step=batches.step_of(entry.rows[0])) as stream:
            digest = digest_hex(next(stream).digest)
        if digest == entry.digest:
            found.remade_steps.append(entry.step)
        else:
            found.problems.append(
                f"step {entry.step}: its rows made anew have the digest {digest}, the ledger has {entry.digest}"
            )


def documents_text(found: DocumentAccount) -> list[str]:
    """The account for people: lines of a name and what there is of it."""
    if found.missing is not None:
        return [f"  documents    not looked at: {found.missing}"]
    lines = [] if not found.first_row else [f"  documents    since row {found.first_row:,}, where this data began"]
    for source in found.sources:
        seen = ", ".join(
            f"{tokens:,} {'never' if not times else 'once' if times == 1 else f'{times} times'}"
            for times, tokens in source.times_seen.items()
        )
        about = "" if source.exact else "about "
        skipped = f"; {source.passed_over:,} tokens were passed over" if source.passed_over else ""
        lines.append(
            f"  {source.source:<11}  {source.tokens:,} tokens, {source.epochs:.4g} epochs; of its "
            f"{source.corpus_tokens:,} tokens it saw {about}{seen}{skipped}"
        )
    if found.remade_steps:
        steps = ", ".join(f"{step:,}" for step in found.remade_steps)
        lines.append(f"  made anew    the rows of step {steps}: as in the ledger")
    return lines
