"""`dstrain threshold`: below which probability a classifier should rather say that a text is none of its labels.

    held-out texts ─► probabilities ─► the threshold that keeps 95 % of those in scope ─► dstrain.json ─► label: null
                                        └─ texts whose label the model was never taught are out of scope: scores

The score is the probability of the best label (Hendrycks & Gimpel 2017). Only texts in scope choose the threshold, so
it is not fitted to those out of scope that happen to be at hand.
"""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstrain.errors import EXIT_DONE, UserError
from dstrain.examples.records import Reading, records_of
from dstrain.predict.loaded import transformers_folder
from dstrain.predict.predictors import TextClassifier
from dstrain.tasks.example_task import SETTINGS
from dstrain.tasks.splits import refuse, text_problem

Floats = NDArray[np.float64]
TRUE_RATE = 0.95  # of texts in scope, at which the rate of those out of scope that pass is told, as is usual
LONGEST_TEXT = 1_000_000  # characters
BATCH_ROWS = 32
OF_THE_RUN = "predictions-valid.jsonl"


def chosen_threshold(in_scope: Floats, keep: float) -> float:
    """The highest threshold at which at least the share `keep` of the probabilities (texts,) is not below it."""
    allowed = math.floor((1 - keep) * len(in_scope) + 1e-9)  # how many may be rejected
    return float(np.sort(in_scope)[allowed])


def scope_scores(in_scope: Floats, right: NDArray[np.bool_], out_of_scope: Floats, threshold: float) -> dict[str, Any]:
    """How well a threshold tells texts in scope from others, and what it does to accuracy.

    `auroc` and `out_of_scope_kept_at_95` (the rate of false positives at 95 % true ones) do not depend on it; both are
    left out where there is no text out of scope.

    Args:
        in_scope: (texts,) probabilities of the best label.
        right: (texts,) whether that label is right.
        out_of_scope: (others,) probabilities of the best label.
        threshold: below it a text is rejected.
    """
    kept = in_scope >= threshold
    scores: dict[str, Any] = {"in_scope": len(in_scope), "out_of_scope": len(out_of_scope)}
    scores |= {"accuracy_of_all": float(right.mean()), "in_scope_kept": float(kept.mean())}
    if kept.any():
        scores["accuracy_of_kept"] = float(right[kept].mean())
    if len(out_of_scope):
        from sklearn.metrics import roc_auc_score

        truth = np.concatenate([np.ones(len(in_scope)), np.zeros(len(out_of_scope))])
        scores["auroc"] = float(roc_auc_score(truth, np.concatenate([in_scope, out_of_scope])))
        at_95 = chosen_threshold(in_scope, TRUE_RATE)
        scores["out_of_scope_kept_at_95"] = float((out_of_scope >= at_95).mean())
        scores["out_of_scope_rejected"] = float((out_of_scope < threshold).mean())
    return scores


def threshold_command(args: Namespace) -> int:
    """`dstrain threshold MODEL [FILE] [--test FILE] [--keep 0.95] [--label-field KEY] [--dry-run] [--json]`."""
    if not 0 < args.keep <= 1:
        raise UserError(f"--keep {args.keep}: is the share of texts in scope that stay; give one of 0.8 to 1")
    folder = transformers_folder(Path(args.model))
    classifier = TextClassifier(folder)
    if classifier.model.config.problem_type in ("regression", "multi_label_classification"):
        raise UserError(f"{folder} does not give one label a text, so there is none to withhold")
    name = args.file or str(Path(args.model) / OF_THE_RUN)
    held_out = _judged(classifier, args.file, args.label_field) if args.file else _judged_by_the_run(Path(name))
    in_scope = held_out[0]
    if not len(in_scope):
        raise UserError(f"{name}: no text has one of the model's labels; the threshold is chosen on those")
    threshold = chosen_threshold(in_scope, args.keep)
    found = {"min_confidence": threshold, "keep": args.keep, "held_out": scope_scores(*held_out, threshold)}
    if args.test:
        tested = _judged(classifier, args.test, args.label_field)
        if not len(tested[0]):
            raise UserError(f"{args.test}: no text has one of the model's labels; give a file that has some")
        found["test"] = scope_scores(*tested, threshold)
    written = None if args.dry_run else _write(folder, threshold)
    if args.json:
        print(json.dumps(found))
    else:
        print(_text(found, {"held_out": name, "test": args.test or ""}, written))
    return EXIT_DONE


def _judged_by_the_run(path: Path) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """As `_judged`, from what the run itself said of the texts that it held out: all of them in scope."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        right = np.array([line["label"] == line["predicted"] for line in lines], bool)
        return np.array([line["confidence"] for line in lines], np.float64), right, np.zeros(0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "give a FILE of held-out texts with labels"
        raise UserError(f"{path}: no predictions of a run on its held-out texts ({error}); {remedy}") from error


def _judged(classifier: TextClassifier, file: str, label_field: str | None) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Probabilities of texts whose label the model knows, which of them are right, and probabilities of all others."""
    label_name = label_field or classifier.label_field
    needed = dict.fromkeys(classifier.fields, "data.text_field") | {label_name: "--label-field"}
    labels = set(classifier.labels.values())
    values: list[tuple[str, ...]] = []
    wanted: list[str] = []
    mistakes: list[str] = []
    for record in records_of(file, Reading(), needed):
        missing = [name for name in needed if name not in record.fields]
        problem = record.problem or (f"has no field {missing[0]!r}; add it, or give --label-field" if missing else None)
        for name in classifier.fields if problem is None else ():
            problem = problem or text_problem(record.fields[name], name, LONGEST_TEXT)
        if problem:
            mistakes.append(f"{record.place}: {problem}")
            continue
        values.append(tuple(record.fields[name] for name in classifier.fields))
        wanted.append(str(record.fields[label_name]))
    refuse(mistakes)
    best = classifier.best(values, BATCH_ROWS) if values else []
    known = np.array([label in labels for label in wanted], bool)
    right = np.array([label == each.label for label, each in zip(wanted, best, strict=True)], bool)
    probabilities = np.array([each.probability for each in best])
    return probabilities[known], right[known], probabilities[~known]


def _write(folder: Path, threshold: float) -> Path:
    """Put the threshold where prediction looks for it."""
    path = folder / SETTINGS
    try:
        settings: dict[str, Any] = {"task": "sequence_classification"}
        settings |= json.loads(path.read_bytes()) if path.exists() else {}
        settings["data"] = settings.get("data", {}) | {"min_confidence": threshold}
        path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be changed ({error}); --dry-run only prints the threshold") from error
    return path


def _text(found: dict[str, Any], names: dict[str, str], written: Path | None) -> str:
    lines = [f"threshold {found['min_confidence']:.3f}: keeps {found['keep']:.0%} of the held-out texts in scope"]
    for part in ("held_out", "test"):
        if part not in found:
            continue
        scores = found[part]
        lines.append(f"{names[part]}: {scores['in_scope']:,} texts in scope, {scores['out_of_scope']:,} out of scope")
        kept = f"  in scope: {scores['in_scope_kept']:.1%} kept"
        if "accuracy_of_kept" in scores:
            kept += f"; accuracy {scores['accuracy_of_kept']:.3f} on those, {scores['accuracy_of_all']:.3f} on all"
        lines.append(kept)
        if "auroc" in scores:
            lines.append(
                f"  out of scope: {scores['out_of_scope_rejected']:.1%} rejected; AUROC {scores['auroc']:.3f}, "
                f"{scores['out_of_scope_kept_at_95']:.1%} pass where 95 % in scope do"
            )
    lines.append(f"→ {written}: below it, `dstrain predict` says label null" if written else "nothing was written")
    return "\n".join(lines)
