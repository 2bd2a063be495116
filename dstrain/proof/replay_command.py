"""`dstrain replay RUN --step N [--rank K --world W] [--trace] [--json]`: a replay as text or JSON."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dstrain.errors import EXIT_DONE, EXIT_FAILURE
from dstrain.proof.replay import Replay, replay
from dstrain.proof.trace import NonFinite
from dstrain.tasks.task import RowDocument

TEXT_SHOWN = 160  # characters of a document


def replay_command(args: Namespace) -> int:
    """`dstrain replay`. Exit code 1 if the rows are not those that the ledger has of the step."""

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    found = replay(Path(args.run), args.step, args.rank, args.world, trace=args.trace, say=say)
    if args.json:
        print(json.dumps(asdict(found) | {"same_rows": found.same_rows}, ensure_ascii=False))
    else:
        print(replay_text(found, args.documents))
    return EXIT_DONE if found.same_rows else EXIT_FAILURE


def replay_text(found: Replay, documents_shown: int) -> str:
    """A replay for people: where from, losses beside the logged ones, gradients by layer, documents, the trace."""
    weights = found.checkpoint or "the run's initial weights"
    trained = f", and {found.steps_trained} steps trained on from there" if found.steps_trained else ""
    digest = "as in the ledger" if found.same_rows else f"{found.digest}, but the ledger has {found.ledger_digest}"
    lines = [
        f"{found.run}: step {found.step:,} of {_ranks(found.world_size)}, replayed on {found.device}",
        *(f"  {line}" for line in found.skipped_checkpoints),
        f"  weights        {weights}{trained}",
        f"  rows           {found.rows[0]:,} to {found.rows[1]:,}; digest {digest}",
        f"  loss           {_beside(found.loss, found.logged_loss)}",
        f"  gradient norm  {_beside(found.gradient_norm, found.logged_gradient_norm)}",
    ]
    shown = found.ranks if found.rank is None else [found.ranks[found.rank]]
    lines += [f"  {f'rank {one.rank}':<13}  {_beside(one.loss, one.logged)}, {one.targets:,} targets" for one in shown]
    lines += ["", *_layers(found)]
    if found.traced:
        lines += ["", trace_text(found.non_finite)]
    whose = "all ranks" if found.rank is None else f"rank {found.rank}"
    lines += ["", f"{len(found.documents):,} documents of {whose}:"]
    lines += [_document(document) for document in found.documents[:documents_shown]]
    if len(found.documents) > documents_shown:
        lines.append(f"  … and {len(found.documents) - documents_shown:,} more (--documents N, or --json for all)")
    return "\n".join(lines)


def trace_text(found: NonFinite | None) -> str:
    """The first value that was not finite, and whose making it was."""
    if found is None:
        return "trace: every output and every gradient at an output is finite"
    where = "its output" if found.pass_name == "forward" else "the gradient at its output"
    rows = ", ".join(map(str, found.rows)) if len(found.rows) <= 8 else f"{found.rows[0]} … {found.rows[-1]}"
    text = (
        f"trace: first in {found.module} ({found.kind}), {found.pass_name} pass: {found.values:,} of {found.of:,} "
        f"values of {where} are not finite (rows {rows})"
    )
    if found.pass_name == "forward":
        inputs = "finite" if found.inputs_finite else "not finite"
        parameters = "finite" if found.parameters_finite else "not finite"
        text += f"; its inputs are {inputs}, its parameters {parameters}"
    return text


def _layers(found: Replay) -> Sequence[str]:
    width = max(len("layer"), *(len(layer.layer) for layer in found.layers))
    with_rank = found.rank is not None
    heading = f"{'layer':<{width}}  {'gradient norm':>13}" + (f"  {f'of rank {found.rank}':>13}" if with_rank else "")
    rows = []
    for layer in found.layers:
        row = f"{layer.layer:<{width}}  {layer.norm:>13.6g}"
        rows.append(row + (f"  {layer.rank_norm:>13.6g}" if layer.rank_norm is not None else ""))
    return [heading, *rows]


def _document(document: RowDocument) -> str:
    number = f", document {document.document}" if document.document is not None else ""
    end = document.first_token + document.tokens - 1
    text = document.text if len(document.text) <= TEXT_SHOWN else f"{document.text[:TEXT_SHOWN]} …"
    return (
        f"  row {document.row}, tokens {document.first_token} to {end}: {document.file}, {document.sample}{number}\n"
        f"    {' '.join(text.split())}"
    )


def _beside(value: float, logged: float | None) -> str:
    return f"{value:.7f}" + (" (not logged)" if logged is None else f", logged {logged:.7f}, {value - logged:+.1e}")


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
