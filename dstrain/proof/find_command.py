"""`dstrain find RUN SHARD:KEY[:NUMBER] | --text-file FILE [--json] [key=value …]`: when a document is trained on."""

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstrain.checkpoint.identity import LAW
from dstrain.checkpoint.manifest import MANIFEST, committed
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, CheckpointError, UserError
from dstrain.proof.data_steps import RunBatches
from dstrain.proof.find import FoundDocument, Occurrence, by_name, by_text, find
from dstrain.proof.training_data import TrainingData
from dstrain.recipe.show import resolved_yaml

_NAME = re.compile(r"(?P<shard>.+?\.tar):(?P<key>.+)")
_NUMBERED = re.compile(r"(?P<key>.+):(?P<number>\d+)")


def find_command(args: Namespace) -> int:
    """`dstrain find`. Exit code 1 where no source holds the document.

    Raises:
        UserError: it is not said which document, or the run's data cannot be opened, or is not the run's.
    """
    document, overrides = args.document, args.overrides
    if args.text_file is not None and document is not None and "=" in document:
        document, overrides = None, [document, *overrides]
    if (document is None) == (args.text_file is None):
        raise UserError("say which document: SHARD:KEY or SHARD:KEY:NUMBER, or its text with --text-file FILE")
    run = Path(args.run)
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's folder")
    data, batches = TrainingData.of(args.run, overrides)
    if args.text_file is not None:
        wanted = f"the text of {args.text_file}"
        spans = by_text(data.corpora, data.tokenizer, Path(args.text_file))
    else:
        wanted = document
        spans = _named(data, document)
    found = find(data, batches, spans)
    if args.json:
        print(json.dumps(_as_json(run, wanted, data, batches, found), ensure_ascii=False))
    else:
        print("\n".join(_lines(args.run, wanted, data, batches, found)))
    return EXIT_DONE if found else EXIT_FAILURE


def _named(data: TrainingData, document: str) -> list[list[tuple[int, int]]]:
    """Where the documents lie that `SHARD:KEY[:NUMBER]` names; a key may itself end in a number."""
    match = _NAME.fullmatch(document)
    if match is None:
        raise UserError(f"{document}: give SHARD:KEY or SHARD:KEY:NUMBER, as in train-000000.tar:doc-000007")
    spans = by_name(data.corpora, match["shard"], match["key"], None)
    numbered = _NUMBERED.fullmatch(match["key"])
    if any(spans) or numbered is None:
        return spans
    return by_name(data.corpora, match["shard"], numbered["key"], int(numbered["number"]))


# ---------------------------------------------------------------- for machines


def _as_json(
    run: Path, wanted: str, data: TrainingData, batches: RunBatches, found: list[FoundDocument]
) -> dict[str, Any]:
    return {
        "run": str(run),
        "wanted": wanted,
        "steps_done": batches.steps_done,
        "last_step": batches.last_step,
        "documents": [asdict(document) | {"trained_tokens": document.trained_tokens} for document in found],
        "rests_on": rests_on(run, data),
    }


def rests_on(run: Path, data: TrainingData) -> dict[str, Any]:
    """The digests of all that rows follow from, so that somebody else can compute them again.

    `identity` is that of canonical JSON (sorted keys), `recipe` that of the resolved recipe, `checkpoint` that of the
    newest manifest, which has those of all its files. All are sha256 but the tokenizer's and the corpora's, which are
    dstrain's own.
    """
    identity = json.dumps(data.identity, sort_keys=True).encode()
    return {
        "law": LAW,
        "tokenizer": data.tokenizer.digest,
        "corpora": {name: corpus.digest for name, corpus in zip(data.names, data.corpora, strict=True)},
        "identity": hashlib.sha256(identity).hexdigest(),
        "recipe": hashlib.sha256(resolved_yaml(data.recipe).encode()).hexdigest(),
        "checkpoint": _newest_checkpoint(run),
    }


def _newest_checkpoint(run: Path) -> dict[str, str] | None:
    for folder in committed(run)[:1]:
        try:
            content = (folder / MANIFEST).read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder / MANIFEST}: {error.strerror or error}") from error
        return {"folder": str(folder), "sha256": hashlib.sha256(content.encode()).hexdigest()}
    return None


# ---------------------------------------------------------------- for people


def _lines(run: str, wanted: str, data: TrainingData, batches: RunBatches, found: list[FoundDocument]) -> Iterator[str]:
    yield f"{run}: {wanted}, in {batches.steps_done:,} steps of {batches.last_step:,}"
    if data.origin[1]:
        yield f"  only since row {data.origin[1]:,}, where this data began"
    if not found:
        yield f"  never: no document of {' or '.join(data.names)} is it, or it has no tokens"
    for document in found:
        yield (
            f"{document.source}: {document.shard}:{document.document}, {document.tokens:,} tokens; "
            f"{document.trained_tokens:,} were trained on"
        )
        if document.never is not None:
            yield f"  never: {document.never}"
        yield from map(_line, document.occurrences)


def _line(found: Occurrence) -> str:
    what = {
        "trained": "",
        "skipped": ", not trained on: its batch is passed over (data.skip_rows)",
        "rolled back": ", not trained on: its batch was dropped by a rollback",
        "to come": ", to come",
    }[found.fate]
    first, last = found.offset, found.offset + found.tokens - 1
    where = f"step {found.step:,}, row {found.row:,} from token {found.first_token:,}"
    return f"  {where}: tokens {first:,} to {last:,} of it{what}"
