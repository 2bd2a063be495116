"""Where a document is in a run: the order of the data inverted, and the ledger asked what became of each batch.

document ─► tokens of the corpus' line ─► (data step, row, tokens) in every epoch ─► step, trained on or not
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.data.layout import RowSpan
from dstrain.data.shards import Corpus
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import UserError
from dstrain.proof.data_steps import Batch, Fate, RunBatches
from dstrain.proof.training_data import TrainingData

Span = tuple[int, int]  # of a corpus' line: first token and the one after the last


@dataclass(frozen=True)
class Occurrence:
    """Tokens of a document in one row. `offset` and `first_token` say where they begin in the document and in the row.

    `step` is the one that the row's batch made, or would have made, or will make.
    """

    fate: Fate
    step: int
    data_step: int
    row: int
    lane: int
    phase: str
    first_token: int
    offset: int
    tokens: int


@dataclass(frozen=True)
class FoundDocument:
    """A document of a source, and every row of the run that holds some of it, in the order of the rows."""

    source: str
    shard: str
    document: str
    tokens: int
    occurrences: tuple[Occurrence, ...]
    never: str | None  # why there is none

    @property
    def trained_tokens(self) -> int:
        """Tokens of it that were trained on, in all epochs."""
        return sum(found.tokens for found in self.occurrences if found.fate == "trained")


def find(data: TrainingData, batches: RunBatches, spans: Sequence[Sequence[Span]]) -> list[FoundDocument]:
    """Where documents are in a run, up to its last step.

    Args:
        data: of the run.
        batches: of the run.
        spans: of each source, where on its line the documents lie.

    Raises:
        CorpusError: a shard cannot be read, or a line of the ledger is damaged.
    """
    steps = batches.last_data_step() + 1
    places: dict[tuple[int, Span], list[RowSpan]] = {}
    for source, of_source in enumerate(spans):
        by_first = {first: (first, last) for first, last in sorted(of_source)}
        firsts = list(by_first)
        places |= {(source, span): [] for span in by_first.values()}
        for first, last in _joined(by_first.values()):
            for part in data.layout.find(source, data.lanes[source], first, last, steps):
                places[source, by_first[firsts[bisect_right(firsts, part.line) - 1]]].append(part)
    fates = batches.fates({part.step for parts in places.values() for part in parts})
    return [_document(data, batches, source, span, parts, fates) for (source, span), parts in places.items()]


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans that follow each other as one: they lie in the same blocks, which are then looked through once."""
    joined: list[Span] = []
    for first, last in sorted(spans):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _document(
    data: TrainingData,
    batches: RunBatches,
    source: int,
    span: Span,
    parts: Sequence[RowSpan],
    fates: dict[int, Batch],
) -> FoundDocument:
    corpus = data.corpora[source]
    slices = corpus.slices(span[0], span[0] + 1)
    place = corpus.document_of(int(slices.shard[0]), int(slices.start[0]))
    occurrences = tuple(
        Occurrence(
            fate=fates[part.step].fate,
            step=fates[part.step].step,
            data_step=part.step,
            row=part.row,
            lane=part.lane,
            phase=data.timeline.phase_at(part.step).name,
            first_token=part.first_token,
            offset=part.line - span[0],
            tokens=part.tokens,
        )
        for part in sorted(parts, key=lambda part: (part.row, part.first_token))
        if part.step in fates  # else it came before an imported run, or the ledger lacks it
    )
    return FoundDocument(
        source=data.names[source],
        shard=str(place.shard),
        document=place.key if place.number is None else f"{place.key}:{place.number}",
        tokens=place.tokens,
        occurrences=occurrences,
        never=None if occurrences else _why_never(data, batches, source),
    )


def _why_never(data: TrainingData, batches: RunBatches, source: int) -> str:
    """Why no row of a run holds any of a document."""
    name, last_step = data.names[source], batches.last_step
    if not any(phase.spec.weights[source] for phase in data.layout.phases):
        return f"no phase gives {name} any weight"
    tokens = int(data.layout.source_tokens(batches.last_data_step() + 1)[source])
    epochs = tokens / data.corpora[source].total_tokens
    return f"the run ends at step {last_step:,}, after {epochs:.3g} epochs of {name}, and does not come to it"


# ---------------------------------------------------------------- which documents


def by_name(corpora: Sequence[Corpus], shard: str, key: str, number: int | None) -> list[list[Span]]:
    """Where on the lines of the sources the documents of a sample lie."""
    return [corpus.find(shard, key, number) for corpus in corpora]


def by_text(corpora: Sequence[Corpus], tokenizer: DocumentTokenizer, file: Path) -> list[list[Span]]:
    """The same of documents with the text of a file; a line break at its end may be missing there.

    Raises:
        UserError: the file cannot be read, or has no text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text-file {file}: {error}; give a file of UTF-8 text") from error
    variants = [tokenizer.encode(variant) for variant in dict.fromkeys((text, text.rstrip("\r\n")))]
    if not any(map(len, variants)):
        raise UserError(f"--text-file {file}: no text in it; give the text of a document")
    different = list({tuple(ids.tolist()): ids for ids in variants}.values())
    return [sorted({span for ids in different for span in corpus.find_ids(ids)}) for corpus in corpora]
