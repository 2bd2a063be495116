"""Sentences of a text: how a model reads them apart, and which of them are most like a summary."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstrain.data.tokens import Encoder
from dstrain.tasks.batching import Ids

BY_CHARACTERS = ("zh", "ja", "th")  # languages whose words have no spaces between them
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_WORDS = re.compile(r"\w+")
_CHARACTERS = re.compile(r"[a-z0-9]+|[^\W_]")  # a run of Latin letters or digits counts as one


def words_of(text: str, language: str) -> list[str]:
    """The words of a text in lower case, or its characters where words have no spaces between them."""
    return (_CHARACTERS if language in BY_CHARACTERS else _WORDS).findall(text.lower())


def sentences_of(text: str) -> tuple[str, ...]:
    """A text in sentences: each ends at a full stop with a space behind it, or at a Chinese one."""
    return tuple(part for part in _END.split(text.strip()) if part.strip())


def joined(sentences: Sequence[str], language: str) -> str:
    """Sentences as a text."""
    return ("" if language in BY_CHARACTERS else " ").join(sentence.strip() for sentence in sentences)


@dataclass(frozen=True)
class MarkedText:
    """[CLS] sentence [SEP] [CLS] sentence [SEP] …, as Liu and Lapata (2019) have it.

    `marks` (sentences that fit,) are the places of the first token of each, which stands for the sentence.
    """

    ids: Ids
    marks: NDArray[np.int64]


def marked_texts(encoder: Encoder, texts: Sequence[Sequence[str]], length: int) -> list[MarkedText]:
    """Texts in sentences, at most `length` tokens of each: a first sentence loses its end, others do not take part."""
    all_ids = encoder.tokenizer.encode_batch_fast([one for text in texts for one in text], add_special_tokens=False)
    found, first = [], 0
    for text in texts:
        ids: list[int] = []
        marks = []
        for encoding in all_ids[first : first + len(text)]:
            sentence = [encoder.cls_id, *encoding.ids[: length - 2], encoder.sep_id]
            if len(ids) + len(sentence) > length:
                break
            marks.append(len(ids))
            ids += sentence
        found.append(MarkedText(np.array(ids, np.int32), np.array(marks, np.int64)))
        first += len(text)
    return found


def most_alike(sentences: Sequence[str], summaries: Sequence[str], count: int, language: str) -> list[int]:
    """Up to `count` sentences that share most words with a summary; none where no word is shared.

    Chosen one by one, each so that ROUGE-1 + ROUGE-2 (F1, without stems) of all that are chosen grows most, against the
    summary where it is greatest; it ends where nothing makes it grow (Nallapati et al. 2017).
    """
    wanted = [_Grams.of(words_of(one, language)) for one in summaries]
    there = [_Grams.of(words_of(one, language)) for one in sentences]
    chosen: list[int] = []
    so_far, best_so_far = _Grams.of([]), 0.0
    for _ in range(count):
        score, negative = max(
            (
                (max((so_far + grams).likeness(one) for one in wanted), -number)
                for number, grams in enumerate(there)
                if number not in chosen
            ),
            default=(0.0, 0),
        )
        if score <= best_so_far:
            break
        chosen.append(-negative)
        so_far, best_so_far = so_far + there[-negative], score
    return sorted(chosen)


def best(scores: NDArray[np.float64], count: int) -> list[int]:
    """The `count` sentences with the highest scores (sentences,), in the text's order; of equal ones the first."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


@dataclass(frozen=True)
class _Grams:
    """How often each word and each pair of neighbouring words occurs."""

    words: Counter[str]
    pairs: Counter[tuple[str, str]]

    @classmethod
    def of(cls, words: Sequence[str]) -> "_Grams":
        return cls(Counter(words), Counter(pairwise(words)))

    def __add__(self, other: "_Grams") -> "_Grams":
        return _Grams(self.words + other.words, self.pairs + other.pairs)

    def likeness(self, other: "_Grams") -> float:
        """ROUGE-1 + ROUGE-2, each the F1 of the words or pairs that both have."""
        return _f1(self.words, other.words) + _f1(self.pairs, other.pairs)


def _f1(one: Counter[Any], other: Counter[Any]) -> float:
    return 2 * (one & other).total() / max(one.total() + other.total(), 1)
