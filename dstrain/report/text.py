"""A report on a terminal: a column for each run, and what was measured by label. Imports no torch."""

from collections.abc import Iterable, Sequence
from typing import Any

from dstrain.report.runs import RunSummary, Spread, differ_by_chance_alone, spreads

LARGEST_CONFUSION_MATRIX = 16  # labels; a wider one cannot be read on a screen
NOTHING = "–"


def report_text(runs: Sequence[RunSummary]) -> str:
    """A table with one column for each run; below it what was measured by label, where the runs are classifiers."""
    parts = [_table(setting_rows(runs))]
    parts += [f"{run.run}: {failure}" for run in runs for failure in run.failures]
    if differ_by_chance_alone(runs):
        parts.append("\n" + spread_text(spreads(runs)))
    parts += ["\n" + _table(source_rows(run), right=True) for run in runs if run.sources]
    classifiers = [run for run in runs if run.classification and {"labels", "entities"} & run.classification.keys()]
    if len(classifiers) == 1:
        parts.append("\n" + _classification_text(classifiers[0].classification or {}))
    elif classifiers:
        parts.append("\n" + _f1_side_by_side(classifiers))
    return "\n".join(parts)


def setting_rows(runs: Sequence[RunSummary]) -> list[tuple[str, list[str]]]:
    """What each run was and what it reached: a name and one cell for each run."""
    scores = list(dict.fromkeys(name for run in runs for name in run.evaluation))
    tested = list(dict.fromkeys(name for run in runs for name in run.test))
    return [
        ("run", [run.run for run in runs]),
        *([("seeds (train, data)", [run.chance for run in runs])] if differ_by_chance_alone(runs) else []),
        ("task", [run.task for run in runs]),
        ("model", [run.model for run in runs]),
        ("weights", [run.weights for run in runs]),
        ("data", [run.data for run in runs]),
        ("global batch", [run.batch for run in runs]),
        ("optimizer", [run.optimizer for run in runs]),
        ("numerics", [run.numerics for run in runs]),
        ("ranks", [_number(run.ranks) for run in runs]),
        ("attempts", [f"{run.attempts} ({len(run.failures)} failed)" for run in runs]),
        ("steps", [f"{run.step:,} of {_number(run.total_steps)}" for run in runs]),
        ("tokens", [_number(run.tokens) for run in runs]),
        ("tokens/s (median)", [_number(run.tokens_per_second) for run in runs]),
        ("waited for data", [_share(run.data_wait_share) for run in runs]),
        ("goodput", [_share(run.goodput) for run in runs]),
        ("newest checkpoint", [_number(run.newest_checkpoint_step) for run in runs]),
        ("training loss", [f"{_loss(run.loss_first)} → {_loss(run.loss_last)}" for run in runs]),
        ("best training loss", [_loss(run.loss_best) for run in runs]),
        ("held out, at step", [_number(run.evaluation_step) for run in runs]),
        *((f"held-out {name}", [_loss(run.evaluation.get(name)) for run in runs]) for name in scores),
        *((f"test {name}", [_loss(run.test.get(name)) for run in runs]) for name in tested),
    ]


def source_rows(run: RunSummary) -> list[tuple[str, list[str]]]:
    """A heading, and a line for each source of a mixture: how much of it was read, and how well it is predicted."""
    total = sum(measured["tokens"] for measured in run.sources.values())
    rows = [("source", ["tokens", "share", "epochs", "loss", "perplexity", "held-out loss"])]
    for name, measured in run.sources.items():
        loss, perplexity = measured["loss"], measured["perplexity"]
        cells = [
            f"{measured['tokens']:,}",
            f"{measured['tokens'] / max(total, 1):.1%}",
            f"{measured['epochs']:.3g}",
            _loss(loss),
            NOTHING if perplexity is None else f"{perplexity:,.4g}",
            _loss(run.evaluation.get(f"loss.{name}")),
        ]
        rows.append((name, cells))
    return rows


def spread_text(found: dict[str, Spread]) -> str:
    """A line for each score: mean, deviation, least, most."""
    rows = [("mean ± deviation", ["", "least", "most", "runs"])]
    for name, spread in found.items():
        cells = [f"{spread.mean:.4f} ± {spread.deviation:.4f}", f"{spread.least:.4f}", f"{spread.most:.4f}"]
        rows.append((name, [*cells, str(spread.runs)]))
    return _table(rows, right=True)


def _classification_text(report: dict[str, Any]) -> str:
    """Precision, recall, F1 and rows by label, and which label was taken for which."""
    names = ("precision", "recall", "f1")
    rows = [("label", [*names, "rows"])]
    by_label = report["labels"] if "labels" in report else report["entities"]
    for label, scores in by_label.items():
        count = scores["rows"] if "rows" in scores else scores["entities"]
        rows.append((label, [*(f"{scores[name]:.3f}" for name in names), f"{count:,}"]))
    if "labels" in report:
        averages = [sum(scores[name] for scores in by_label.values()) / len(by_label) for name in names]
        rows.append(("mean of labels", [*(f"{average:.3f}" for average in averages), f"{report['rows']:,}"]))
    text = _table(rows, right=True)
    shared = max(report["texts_also_in_train"], report.get("texts_alike_in_train", 0))
    if shared:
        text += f"\n{shared:,} of the texts are in the training file too: the scores flatter"
    for name, reasons in report.get("dropped", {}).items():
        text += f"\n{name}: dropped " + "; ".join(f"{count:,} × {reason}" for reason, count in reasons.items())
    labels = list(by_label)
    if "confusion" in report and len(labels) <= LARGEST_CONFUSION_MATRIX:
        matrix = [("true ↓  predicted →", labels)]
        matrix += [
            (label, [f"{n:,}" for n in counts]) for label, counts in zip(labels, report["confusion"], strict=True)
        ]
        text += "\n\n" + _table(matrix, right=True)
    return text


def _f1_side_by_side(runs: Sequence[RunSummary]) -> str:
    by_run = [(run.classification or {}).get("labels") or (run.classification or {})["entities"] for run in runs]
    labels = list(dict.fromkeys(label for scores in by_run for label in scores))
    rows = [("F1 by label", [run.name for run in runs])]
    for label in labels:
        found = [scores.get(label) for scores in by_run]
        rows.append((label, [NOTHING if scores is None else f"{scores['f1']:.3f}" for scores in found]))
    for name, key in (("macro F1", "macro_f1"), ("accuracy", "accuracy"), ("F1 of entities", "f1")):
        given = [(run.classification or {}).get(key) for run in runs]
        if any(score is not None for score in given):
            rows.append((name, [NOTHING if score is None else f"{score:.3f}" for score in given]))
    return _table(rows, right=True)


def _table(rows: Iterable[tuple[str, Sequence[str]]], *, right: bool = False) -> str:
    """Aligned columns, the first one to the left."""
    listed = [(heading, *cells) for heading, cells in rows]
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    lines = []
    for heading, *cells in listed:
        aligned = [cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([heading.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"
