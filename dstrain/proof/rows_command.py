"""`dstrain rows RECIPE|RUN --steps A-B [--row K] [--decode] [--json] [key=value …]`: rows as the model sees them."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from dstrain.data.masking import NO_LABEL
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import EXIT_DONE, UserError
from dstrain.proof.data_steps import RunBatches
from dstrain.proof.model_rows import ModelRow, model_rows
from dstrain.proof.training_data import TrainingData

DOCUMENT_STYLES = ("cyan", "green", "yellow", "magenta")  # in turn, so that borders show
MASKED_STYLE = "bold reverse"
_STEPS = re.compile(r"(\d+)(?:-(\d+))?")


def rows_command(args: Namespace) -> int:
    """`dstrain rows`: a line of JSON for each row, or text, in colour on a terminal.

    Raises:
        UserError: there are no such steps or rows, or no shards that they could be of.
    """
    data, batches = TrainingData.of(args.source, args.overrides)
    steps = _wanted(args, data, batches)
    tokenizer = data.tokenizer if args.decode else None
    if args.json:
        for row in model_rows(data, steps, args.row):
            print(json.dumps(_as_json(row, tokenizer), ensure_ascii=False))
        return EXIT_DONE
    console = Console(soft_wrap=True, highlight=False)
    for row in model_rows(data, steps, args.row):
        for line in _lines(row, tokenizer):
            console.print(line)
    return EXIT_DONE


def _wanted(args: Namespace, data: TrainingData, batches: RunBatches) -> dict[int, int]:
    """The steps that are asked for, with the data steps that they are made of."""
    if args.steps is None and args.row is None:
        raise UserError("--steps is missing; give steps as in 1-3, or a row with --row")
    if args.steps is None:
        steps = _step_of_row(batches, args.row)
    else:
        first, last = _first_and_last(args.steps)
        steps = batches.data_steps_of(first, last)
        if len(steps) < last - first + 1:
            raise UserError(
                f"--steps {args.steps}: {args.source} went on with other data at data step {data.origin[0]}; the rows "
                f"of steps before that were of shards that it no longer names"
            )
        if args.row is not None:
            steps = _only_with_row(batches, steps, args.row)
    if max(steps) > batches.last_step:
        last_step = batches.last_step
        raise UserError(f"step {max(steps)}: {args.source} has {last_step} steps; give steps from 1 to {last_step}")
    return steps


def _first_and_last(text: str) -> tuple[int, int]:
    match = _STEPS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--steps {text}: give a step from 1 on, or several as in 3-5")
    return first, last


def _only_with_row(batches: RunBatches, steps: dict[int, int], row: int) -> dict[int, int]:
    """The step that has a row, of some."""
    rows = batches.rows
    for step, data_step in steps.items():
        if rows.first_row(data_step) <= row < rows.first_row(data_step + 1):
            return {step: data_step}
    first, last = rows.first_row(min(steps.values())), rows.first_row(max(steps.values()) + 1) - 1
    raise UserError(f"--row {row}: these steps have rows of {first} to {last}; give one of them, or --row alone")


def _step_of_row(batches: RunBatches, row: int) -> dict[int, int]:
    """The step that a row is of, or would have been of."""
    first_row = batches.rows.origin[1]
    if row < first_row:
        raise UserError(f"--row {row}: the data that is there now begins with row {first_row}; give one from there on")
    data_step = batches.rows.step_of(row)
    return {batch.step: data_step for data_step, batch in batches.fates([data_step]).items()}


# ---------------------------------------------------------------- for machines and for people


def _as_json(row: ModelRow, tokenizer: DocumentTokenizer | None) -> dict[str, Any]:
    """A row; with a tokenizer, it and its pieces also as text."""
    content: dict[str, Any] = {
        "step": row.step,
        "data_step": row.data_step,
        "row": row.row,
        "lane": row.lane,
        "source": row.source,
        "phase": row.phase,
        "pieces": [
            {
                "shard": piece.shard,
                "document": piece.document,
                "offset": piece.offset,
                "tokens": piece.tokens,
                **({} if tokenizer is None else {"text": tokenizer.decode(piece.ids)}),
            }
            for piece in row.pieces
        ],
        "input_ids": row.input_ids.tolist(),
        "labels": row.labels.tolist(),
    }
    return content if tokenizer is None else content | {"text": tokenizer.decode(row.input_ids)}


def _lines(row: ModelRow, tokenizer: DocumentTokenizer | None) -> Iterator[Text]:
    """A row for people: what it is, and each document as the model sees it; a masked token as `[seen → was]`."""
    masked = int((row.labels != NO_LABEL).sum())
    about = f"step {row.step:,}, row {row.row:,}: lane {row.lane}, {row.source}, {row.phase}, {masked} masked"
    yield Text(about, style="bold")
    for number, piece in enumerate(row.pieces):
        last = piece.offset + piece.tokens - 1
        yield Text(f"  {piece.shard}:{piece.document}, tokens {piece.offset:,} to {last:,}", style="dim")
        line = Text("   ", style=DOCUMENT_STYLES[number % len(DOCUMENT_STYLES)])
        for place in range(piece.first_token, piece.first_token + piece.tokens):
            seen, was = int(row.input_ids[place]), int(row.labels[place])
            if was == NO_LABEL:
                line.append(f" {_token(seen, tokenizer)}")
            else:
                line.append(" ")
                line.append(f"[{_token(seen, tokenizer)} → {_token(was, tokenizer)}]", style=MASKED_STYLE)
        yield line


def _token(number: int, tokenizer: DocumentTokenizer | None) -> str:
    """A token as its tokenizer spells it, or as a number."""
    spelled = None if tokenizer is None else tokenizer.tokenizer.id_to_token(number)
    return str(number) if spelled is None else spelled
