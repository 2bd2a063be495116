"""Exact match and F1 of answers, by SQuAD's official rules for English, and by characters for Chinese.

English (the evaluation scripts of SQuAD 1.1 and 2.0): in lower case, without punctuation and the articles a, an, the;
F1 over words. Chinese: without punctuation; F1 over characters, a run of Latin letters or digits counting as one. The
best of several true answers counts; where none is right, so is the empty one alone.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.tasks.calibration import binned

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MIXED = re.compile(r"[a-z0-9]+|\S")


@dataclass(frozen=True)
class Judged:
    """What was said to a question: the best span, by how much the empty answer beats it, and the true answers.

    `candidates` are the n best spans, and where it is allowed the empty answer, with their scores.
    """

    span: str
    null_margin: float
    true: Sequence[str]
    candidates: Sequence[tuple[str, float]]


def words_of(text: str, language: str) -> list[str]:
    """An answer as the words, or the characters, that are compared."""
    text = text.lower()
    if language == "zh":
        return _MIXED.findall("".join(" " if unicodedata.category(one)[0] == "P" else one for one in text))
    return _ARTICLES.sub(" ", "".join(one for one in text if one not in string.punctuation)).split()


def exact(predicted: str, true: str, language: str) -> float:
    """1 if they are the same once normalised, else 0."""
    return float(words_of(predicted, language) == words_of(true, language))


def f1(predicted: str, true: str, language: str) -> float:
    """Harmonic mean of the shares of words that they have in common; an empty answer is like another empty one only."""
    left, right = words_of(predicted, language), words_of(true, language)
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right))


def confidence(said: str, candidates: Sequence[tuple[str, float]], language: str) -> float:
    """The probability of an answer: the softmax over the candidates' scores, those that are alike taken together.

    What is no candidate has no probability, so that it looks more probable than it is, the less the fewer they are.

    Args:
        said: one of the candidates.
        candidates: texts, and their scores in logarithms.
        language: by whose rules answers are alike.
    """
    best, own = max(score for _, score in candidates), words_of(said, language)
    odds = [(words_of(text, language) == own, math.exp(score - best)) for text, score in candidates]
    return sum(value for alike, value in odds if alike) / sum(value for _, value in odds)


def answer_scores(judged: Sequence[Judged], *, unanswerable: bool, threshold: float, language: str) -> dict[str, Any]:
    """Exact match and F1 in shares of 1; with unanswerable questions also of each kind, and the best threshold for F1.

    Args:
        judged: one for each question.
        unanswerable: whether the empty answer is allowed.
        threshold: the empty answer is given where its margin is above it.
        language: `en` or `zh`.
    """
    kept: list[tuple[float, float, bool]] = []  # exact, F1, whether there is an answer
    with_span: list[float] = []
    of_each = []
    for one in judged:
        said = "" if unanswerable and one.null_margin > threshold else one.span
        true = [answer for answer in one.true if words_of(answer, language)] or [""]
        kept.append(
            (max(exact(said, t, language) for t in true), max(f1(said, t, language) for t in true), true != [""])
        )
        match, overlap, has = kept[-1]
        sure = confidence(said, one.candidates, language)
        own = {"exact_match": match, "f1": overlap}
        if unanswerable:
            own["answerable_f1" if has else "unanswerable_f1"] = overlap
        of_each.append(
            {
                "predicted": said,
                "confidence": sure,
                "badness": 1 - overlap,
                "scores": own,
                "calibration": binned(sure, match == 1.0),
            }
        )
        with_span.append(max(f1(one.span, t, language) for t in true))
    scores: dict[str, Any] = {"exact_match": _mean([e for e, _, _ in kept]), "f1": _mean([f for _, f, _ in kept])}
    if not unanswerable:
        return scores | {"report": dict(scores), "judged": of_each}
    for name, kind in (("answerable", True), ("unanswerable", False)):
        if any(has == kind for *_, has in kept):
            scores[f"{name}_f1"] = _mean([f for _, f, has in kept if has == kind])
    best, at = _best_threshold(
        [(one.null_margin, f, has) for one, f, (*_, has) in zip(judged, with_span, kept, strict=True)]
    )
    return scores | {"report": scores | {"best_f1": best, "best_f1_null_threshold": at}, "judged": of_each}


def _best_threshold(questions: list[tuple[float, float, bool]]) -> tuple[float, float]:
    """The best F1 of any threshold, and the threshold: (margin of the empty answer, F1 of the span, has an answer)."""
    score = best = sum(1.0 for *_, has in questions if not has)  # all answers empty
    at = min((margin for margin, *_ in questions), default=0.0) - 1.0
    for margin, span_f1, has in sorted(questions):
        score += span_f1 if has else span_f1 - 1.0
        if score > best:
            best, at = score, margin
    return best / max(len(questions), 1), at


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
