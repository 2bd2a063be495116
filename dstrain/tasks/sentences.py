"""Sentences of a text: how a model reads them apart, and which of them are most like a summary."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dstrain.data.tokens import DocumentTokenizer
from dstrain.tasks.batching import Ids

BY_CHARACTERS = ("zh", "ja", "th")  # languages whose words have no spaces between them
NO_SCORE = -1e30  # of a sentence without tokens
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
class SplitText:
    """[CLS] sentence sentence … [SEP]. `sentences` (tokens,): the number of the sentence that a token is of, or -1."""

    ids: Ids
    sentences: NDArray[np.int64]
    count: int  # sentences that fit


def split_texts(encoder: DocumentTokenizer, texts: Sequence[Sequence[str]], length: int) -> list[SplitText]:
    """Texts in sentences, at most `length` tokens of each: a first sentence loses its end, others do not take part."""
    parts = (f" {one}" if number else one for text in texts for number, one in enumerate(text))
    all_ids = encoder.tokenizer.encode_batch_fast(list(parts), add_special_tokens=False)
    found, first, room = [], 0, length - 2
    for text in texts:
        ids: list[int] = []
        sentences: list[int] = []
        count = 0
        for encoding in all_ids[first : first + len(text)]:
            kept = encoding.ids[:room] if count == 0 else encoding.ids
            if len(ids) + len(kept) > room:
                break
            ids += kept
            sentences += [count] * len(kept)
            count += 1
        whole = np.array([encoder.cls_id, *ids, encoder.sep_id], np.int32)
        found.append(SplitText(whole, np.array([-1, *sentences, -1], np.int64), count))
        first += len(text)
    return found


def padded_sentences(texts: Sequence[SplitText], width: int) -> Tensor:
    """`sentences` of texts that share a batch, int64 (texts, width), -1 behind their ends."""
    batch = np.full((len(texts), width), -1, np.int64)
    for number, text in enumerate(texts):
        batch[number, : len(text.sentences)] = text.sentences
    return torch.from_numpy(batch)


def sentence_scores(logits: Tensor, sentences: Tensor, count: int) -> Tensor:
    """Scores of sentences, fp32 (rows, count): the mean over their tokens; of one without tokens `NO_SCORE`.

    Args:
        logits: (rows, tokens).
        sentences: int64 (rows, tokens), the number of the sentence that a token is of, -1 for none.
        count: of sentences, more than any number.
    """
    places = sentences.masked_fill(sentences < 0, count)  # one more than is asked for
    nothing = logits.new_zeros((len(logits), count + 1), dtype=torch.float32)
    sums = nothing.scatter_add(1, places, logits.float())[:, :count]
    tokens = nothing.scatter_add(1, places, torch.ones_like(logits, dtype=torch.float32))[:, :count]
    return (sums / tokens.clamp(min=1)).masked_fill(tokens == 0, NO_SCORE)


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
