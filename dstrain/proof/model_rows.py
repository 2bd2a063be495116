"""Rows of some steps as the model sees them, with the documents that they are made of: without a model, or ranks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dstrain.data.masking import NO_LABEL
from dstrain.data.row_documents import DocumentSlice, RowDocuments
from dstrain.data.rows import StepRows
from dstrain.data.stream import RowStream
from dstrain.proof.training_data import TrainingData


@dataclass(frozen=True)
class RowPiece:
    """A document, or the part of it that lies in a row, before anything is masked and before pairs are made.

    `shard` and `document` (its sample's key, and its number where the sample holds several) name it as `dstrain find`
    takes it. `offset` and `first_token` say where the part begins in the document and in the row.
    """

    shard: str
    document: str
    offset: int
    tokens: int
    first_token: int
    ids: NDArray[np.integer]


@dataclass(frozen=True)
class ModelRow:
    """One row. `labels` are those of the masked tokens where they stand, and -100 elsewhere. Both (tokens,)."""

    step: int
    data_step: int
    row: int
    lane: int
    source: str
    phase: str
    pieces: tuple[RowPiece, ...]
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def model_rows(data: TrainingData, data_steps: Mapping[int, int], row: int | None) -> Iterator[ModelRow]:
    """The rows of some steps, by step and row.

    Args:
        data: of a run or a recipe.
        data_steps: step → the data step that it is made of.
        row: the number of the only row that is wanted, which is one of the only step; None for all.

    Raises:
        CorpusError: a shard cannot be read, or is not what was indexed.
    """
    documents = RowDocuments(data.spec)
    rank, world = 0, 1
    if row is not None:  # its lane alone
        (data_step,) = data_steps.values()
        rank, world = _lane(data, data_step, row), data.spec.lanes
    for step, rows in _steps(data, data_steps, rank, world):
        slices: dict[int, list[DocumentSlice]] = {}
        for piece in documents.of_step(rank, world, rows.step):
            slices.setdefault(piece.row, []).append(piece)
        for index, number in enumerate(rows.row_numbers.tolist()):
            if row in (None, number):
                yield _model_row(data, step, rows, index, slices[number])


def _steps(data: TrainingData, data_steps: Mapping[int, int], rank: int, world: int) -> Iterator[tuple[int, StepRows]]:
    """The rows of each step; those of data steps that follow each other from one stream."""
    stream, position = None, -1
    for step, data_step in sorted(data_steps.items()):
        if stream is None or data_step != position:
            stream = RowStream(data.spec, rank, world, first_step=data_step)
        yield step, next(stream)
        position = data_step + 1


def _model_row(data: TrainingData, step: int, rows: StepRows, index: int, slices: list[DocumentSlice]) -> ModelRow:
    number = int(rows.row_numbers[index])
    labels = np.full_like(rows.input_ids[index], NO_LABEL)
    is_masked = rows.labels[index] != NO_LABEL
    labels[rows.masked_positions[index][is_masked]] = rows.labels[index][is_masked]
    return ModelRow(
        step=step,
        data_step=rows.step,
        row=number,
        lane=_lane(data, rows.step, number),
        source=data.names[int(rows.sources[index])],
        phase=data.timeline.phase_at(rows.step).name,
        pieces=tuple(
            RowPiece(
                shard=piece.shard,
                document=piece.key if piece.document is None else f"{piece.key}:{piece.document}",
                offset=piece.offset,
                tokens=len(piece.ids),
                first_token=piece.first_token,
                ids=piece.ids,
            )
            for piece in slices
        ),
        input_ids=rows.input_ids[index].copy(),
        labels=labels,
    )


def _lane(data: TrainingData, data_step: int, row: int) -> int:
    """The lane of a row of a data step."""
    return (row - data.layout.phase_at(data_step).first_row_of(data_step)) % data.spec.lanes
