"""`dstrain predict`: apply a trained model to texts, in order, one JSON line out for each line in.

    {"text": "…", "label": "torch", "probability": 0.93}

A line that cannot be used gets `{"error": "FILE:3: …"}` in its place, so that line n out is always line n in; the
command then names all of them at the end and exits with 2.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from dstrain.errors import EXIT_DONE, UserError
from dstrain.predict.items import Item, read_items
from dstrain.predict.loaded import transformers_folder
from dstrain.predict.predictors import Predictor, load_predictor

STANDARD_INPUT = "-"
MISTAKES_SHOWN = 20


def predict_items(predictor: Predictor, items: Iterator[Item], batch_rows: int) -> Iterator[dict[str, Any]]:
    """One JSON object for each item, in order: its `id` if it has one, what was given, and what the model says."""
    while batch := list(islice(items, batch_rows)):
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
    with opened(file) as stream:
        name = "standard input" if file == STANDARD_INPUT else file
        items = read_items(stream, name, fields, predictor.tokens_field)
        watched = sys.stderr.isatty() and not sys.stdout.isatty()
        for done, line in enumerate(predict_items(predictor, items, batch_rows), start=1):
            print(json.dumps(line, ensure_ascii=False), flush=True)
            if watched and done % batch_rows == 0:
                print(f"\r{done:,} lines", end="", file=sys.stderr, flush=True)
            if "error" in line:
                mistakes.append(line["error"])
    if watched:
        print(file=sys.stderr)
    if mistakes:
        more = [f"and {len(mistakes) - MISTAKES_SHOWN:,} more"] if len(mistakes) > MISTAKES_SHOWN else []
        raise UserError("\n".join([*mistakes[:MISTAKES_SHOWN], *more]))
    return EXIT_DONE


def opened(file: str) -> AbstractContextManager[BinaryIO]:
    """A file, or standard input where it is called `-`. Raises UserError where it cannot be opened."""
    if file == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(file).open("rb")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
