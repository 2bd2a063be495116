"""`dstrain predict`: apply a trained model to texts, in order, one JSON line out for each line in.

    {"text": "…", "label": "torch", "probability": 0.93}

A line that cannot be used gets `{"error": "FILE:3: …"}` in its place, so that line n out is always line n in; the
command then names all of them at the end and exits with 2.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from dstrain.errors import EXIT_DONE, UserError
from dstrain.predict.items import Item, read_items
from dstrain.predict.load_predictor import load_predictor
from dstrain.predict.loaded import transformers_folder
from dstrain.predict.predictors import Predictor

STANDARD_INPUT = "-"
BATCHES_AT_ONCE = 8  # of a file; standard input may be slow, and each batch of it is answered when it is there
MISTAKES_SHOWN = 20


def predict_items(
    predictor: Predictor, items: Iterator[Item], batch_rows: int, batches_at_once: int = 1
) -> Iterator[dict[str, Any]]:
    """One JSON object for each item, in order: its `id` if it has one, what was given, and what the model says.

    Args:
        predictor: the model.
        items: what to apply it to; so many batches of them are read before the first is answered.
        batch_rows: most rows that share a batch.
        batches_at_once: those within which texts of like length share a batch.
    """
    while batch := list(islice(items, batch_rows * batches_at_once)):
        values = [item.values for item in batch if item.problem is None]
        answers = iter(predictor.answers(values, batch_rows) if values else [])
        for item in batch:
            if item.problem is not None:
                yield {"error": f"{item.place}: {item.problem}"}
            else:
                names = predictor.fields if isinstance(item.values[0], str) else (predictor.tokens_field or "tokens",)
                given = dict(zip(names, item.values, strict=True))
                yield ({} if item.id is None else {"id": item.id}) | given | next(answers)


def predict_command(args: Namespace) -> int:
    """`dstrain predict MODEL FILE|- [--text-field KEY] [--batch-rows 32]`."""
    predictor = load_predictor(transformers_folder(Path(args.model)))
    return predict_file(predictor, args.file, args.text_field, args.batch_rows)


def predict_file(predictor: Predictor, file: str, text_field: str | None, batch_rows: int) -> int:
    """Print a line for each line of a file, or of standard input, and return the exit code.

    Raises:
        UserError: it cannot be read; or, once all is printed, the lines that could not be used.
    """
    if batch_rows < 1:
        raise UserError(f"--batch-rows {batch_rows}: a batch has 1 row at least")
    fields = (text_field or predictor.fields[0], *predictor.fields[1:])
    mistakes: list[str] = []
    name, at_once = ("standard input", 1) if file == STANDARD_INPUT else (file, BATCHES_AT_ONCE)
    with opened(file) as stream, _watched(stream, name) as read:
        items = read_items(read, name, fields, predictor.tokens_field)
        for line in predict_items(predictor, items, batch_rows, at_once):
            print(json.dumps(line, ensure_ascii=False), flush=True)
            if "error" in line:
                mistakes.append(line["error"])
    if mistakes:
        more = [f"and {len(mistakes) - MISTAKES_SHOWN:,} more"] if len(mistakes) > MISTAKES_SHOWN else []
        raise UserError("\n".join([*mistakes[:MISTAKES_SHOWN], *more]))
    return EXIT_DONE


@contextmanager
def _watched(stream: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The same stream, with a bar on the terminal of how much of it was read; none where answers go there."""
    console = Console(stderr=True)
    about = os.fstat(stream.fileno())
    total = about.st_size if S_ISREG(about.st_mode) else None
    hidden = sys.stdout.isatty() or not console.is_terminal
    # Left to itself it sends standard output to its terminal, too: not the answers.
    with (
        Progress(console=console, transient=True, disable=hidden, redirect_stdout=False) as bar,
        bar.wrap_file(stream, total, description=Path(name).name) as read,
    ):
        yield read


def opened(file: str) -> AbstractContextManager[BinaryIO]:
    """A file, or standard input where it is called `-`. Raises UserError where it cannot be opened."""
    if file == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(file).open("rb")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
