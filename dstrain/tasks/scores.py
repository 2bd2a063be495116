"""How good a classifier is, in scikit-learn's and SciPy's terms: numbers, and JSON under `report`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstrain.tasks.calibration import binned

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def label_scores(labels: Sequence[str], true: Ints, logits: Floats) -> dict[str, Any]:
    """Scores of one label a text.

    A label that is never predicted has precision 0, one that never occurs has recall 0; both count in the macro F1.
    AUROC is that of the second of two labels, or the macro average of one label against the rest; it is left out where
    a label never occurs.

    Args:
        labels: names.
        true: (examples,) indices into `labels`.
        logits: (examples, labels).
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef, roc_auc_score

    indices = np.arange(len(labels))
    predicted = logits.argmax(axis=-1)
    report = _report(labels, true, predicted)
    averages = {
        f"{average}_f1": float(f1_score(true, predicted, labels=indices, average=average, zero_division=0.0))
        for average in ("macro", "micro", "weighted")
    }
    scores: dict[str, Any] = {"accuracy": float(accuracy_score(true, predicted)), **averages}
    scores["matthews"] = float(matthews_corrcoef(true, predicted))
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    judged: list[dict[str, Any]] = [
        {
            "label": labels[t],
            "predicted": labels[p],
            "confidence": confidence,
            "badness": float(t != p),
            "scores": {"accuracy": float(t == p)},
            "calibration": binned(confidence, t == p),
        }
        for t, p, confidence in zip(true.tolist(), predicted.tolist(), probabilities.max(axis=-1).tolist(), strict=True)
    ]
    if set(true.tolist()) == set(indices.tolist()):
        chances = probabilities[:, 1] if len(labels) == 2 else probabilities
        scores["auroc"] = float(roc_auc_score(true, chances, multi_class="ovr", labels=indices))
        columns = indices[1:] if len(labels) == 2 else indices
        _add_auroc(judged, [(true == column, probabilities[:, column]) for column in columns.tolist()])
    report["confusion"] = confusion_matrix(true, predicted, labels=indices).tolist()
    return scores | {"report": scores | report, "judged": judged}


def label_set_scores(labels: Sequence[str], true: Ints, logits: Floats) -> dict[str, Any]:
    """Scores of several labels a text; each is taken where its probability is above one half.

    `accuracy` counts texts whose labels are all right. AUROC is the macro average over labels of which some texts have,
    and some have not.

    Args:
        labels: names.
        true: (examples, labels) of 0 and 1.
        logits: (examples, labels).
    """
    from sklearn.metrics import f1_score, roc_auc_score

    predicted = (logits > 0).astype(np.int64)
    scores: dict[str, Any] = {"accuracy": float((predicted == true).all(axis=-1).mean())}
    for average in ("macro", "micro", "weighted"):
        scores[f"{average}_f1"] = float(f1_score(true, predicted, average=average, zero_division=0.0))
    sure = 1 / (1 + np.exp(-np.abs(logits)))  # of each label that it is there, or is not
    judged: list[dict[str, Any]] = [
        {
            "labels": [labels[place] for place in np.flatnonzero(wanted).tolist()],
            "predicted": [labels[place] for place in np.flatnonzero(said).tolist()],
            "badness": float((said != wanted).mean()),
            "scores": {"accuracy": float((said == wanted).all())},
            "calibration": binned(confidence, said == wanted),
        }
        for said, wanted, confidence in zip(predicted, true, sure, strict=True)
    ]
    told_apart = [column for column in range(len(labels)) if 0 < true[:, column].sum() < len(true)]
    if told_apart:
        areas = [roc_auc_score(true[:, column], logits[:, column]) for column in told_apart]
        scores["auroc"] = float(np.mean(areas))
        _add_auroc(judged, [(true[:, column] == 1, logits[:, column]) for column in told_apart])
    return scores | {"report": scores | _report(labels, true, predicted), "judged": judged}


def number_scores(true: Floats, predicted: Floats) -> dict[str, Any]:
    """Scores of numbers, both (examples,). Correlations are left out where one side never changes."""
    from scipy.stats import pearsonr, spearmanr

    differences = predicted - true
    scores: dict[str, Any] = {
        "mean_squared_error": float((differences**2).mean()),
        "mean_absolute_error": float(np.abs(differences).mean()),
    }
    if len(true) > 1 and np.ptp(true) > 0 and np.ptp(predicted) > 0:
        for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr)):
            value = float(correlation(true, predicted).statistic)
            if math.isfinite(value):
                scores[name] = value
    judged = [
        {
            "number": number,
            "predicted": value,
            "badness": abs(value - number),
            "scores": {"mean_squared_error": (value - number) ** 2, "mean_absolute_error": abs(value - number)},
        }
        for number, value in zip(true.tolist(), predicted.tolist(), strict=True)
    ]
    return scores | {"report": dict(scores), "judged": judged}


def _add_auroc(judged: list[dict[str, Any]], sides: Sequence[tuple[NDArray[np.bool_], Floats]]) -> None:
    """Give examples the pseudo-values of the macro average of the areas: the area, and how each example moves it.

    An example's part is the share of the other side that it is ranked rightly to, halves for ties (DeLong et al. 1988).

    Args:
        judged: of each example.
        sides: for each area, which examples are positive, and what orders them, both (examples,).
    """
    values = np.mean([auroc_pseudo_values(positive, order) for positive, order in sides], axis=0)
    for each, value in zip(judged, values.tolist(), strict=True):
        each["pseudo_values"] = {"auroc": value}


def auroc_pseudo_values(positive: NDArray[np.bool_], order: Floats) -> Floats:
    """(examples,) numbers whose mean is the AUROC, and whose variance over their number that of it.

    Args:
        positive: (examples,), some but not all.
        order: (examples,), the higher the more likely positive.
    """
    from scipy.stats import rankdata

    ranks, rightly = rankdata(order), np.zeros(len(order))
    for side in (positive, ~positive):
        below = (ranks[side] - rankdata(order[side])) / (~side).sum()  # share of the other side that is below
        rightly[side] = below if side is positive else 1 - below
    area, share = rightly[positive].mean(), positive.mean()
    pseudo: Floats = area + (rightly - area) / np.where(positive, share, 1 - share)
    return pseudo


def _report(labels: Sequence[str], true: Ints, predicted: Ints) -> dict[str, Any]:
    """Precision, recall, F1 and rows by label, and scikit-learn's table of them as text."""
    from sklearn.metrics import classification_report, precision_recall_fscore_support

    indices = np.arange(len(labels))
    columns = precision_recall_fscore_support(true, predicted, labels=indices, zero_division=0.0)
    by_label = {
        label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
        for label, precision, recall, f1, rows in zip(labels, *columns, strict=True)
    }
    text = classification_report(
        true, predicted, labels=indices, target_names=list(labels), digits=3, zero_division=0.0
    )
    return {"labels": by_label, "classification_report": text}
