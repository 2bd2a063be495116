#!/usr/bin/env python3
"""Recompute the ledger of a masked-LM run from its recipe alone: on one process, without a model, without training.

    python tools/recompute_ledger.py RUN --out DIR

Writes DIR/ledger.jsonl for as many steps as the run has done. `dstrain ledger RUN DIR` then shows whether the run, on
its ranks and through its restarts, was fed the rows that an uninterrupted run on one rank would have been fed.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, LedgerWriter, read_ledger
from dstrain.data.producer import StreamSpec
from dstrain.data.rows import digest_hex
from dstrain.data.stream import RowStream
from dstrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from dstrain.proof.history import run_ledger
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe


def recompute(run_dir: Path, out: Path) -> int:
    """Write the ledger below `out` and return its number of steps. Raises UserError where the run cannot be read."""
    recipe = load_recipe(run_dir / "recipe.yaml").recipe
    if not isinstance(recipe, MaskedLmRecipe):
        raise UserError(f"{run_dir} is a {recipe.task} run; the rows of masked_lm runs are recomputed")
    steps = next(read_ledger(run_ledger(run_dir))).step
    rows = recipe.train.global_batch_rows
    out.mkdir(parents=True, exist_ok=True)
    (out / LEDGER_NAME).unlink(missing_ok=True)
    with (
        RowStream(StreamSpec.from_recipe(recipe, "train"), rank=0, world=1) as stream,
        LedgerWriter(out / LEDGER_NAME) as ledger,
    ):
        for step, batch in enumerate(islice(stream, steps), start=1):
            ledger.append(LedgerEntry(step, ((step - 1) * rows, step * rows - 1), digest_hex(batch.digest)))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description="recompute a run's ledger from its recipe, without training")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for ledger.jsonl")
    args = parser.parse_args()
    try:
        steps = recompute(args.run, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{steps:,} steps read anew on one process, without a model → {args.out / LEDGER_NAME}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
