#!/usr/bin/env python
"""BM25 on the queries of a retrieval recipe: what ranking by shared words alone gives, to compare with.

    .venv/bin/python tools/bench/bm25.py recipes/finetune/cranfield.yaml [--split test]

Robertson and Zaragoza 2009, with k1 = 1.2 and b = 0.75; words are runs of letters and digits in lower case.
"""

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import RetrievalRecipe
from dstrain.tasks.queries import read_queries
from dstrain.tasks.rank_scores import DEEP, mean_scores, ranking_scores

K1, B = 1.2, 0.75


class Bm25:
    """Documents by the words that they share with a query."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        self._postings: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._lengths = {}
        for key, text in documents.items():
            counts = Counter(words(text))
            self._lengths[key] = sum(counts.values())
            for word, count in counts.items():
                self._postings[word].append((key, count))
        self._mean_length = sum(self._lengths.values()) / len(self._lengths)

    def ranked(self, query: str) -> list[str]:
        """The documents that share a word, the best first."""
        scores: dict[str, float] = defaultdict(float)
        for word in words(query):
            found = self._postings.get(word, [])
            rarity = math.log(1 + (len(self._lengths) - len(found) + 0.5) / (len(found) + 0.5))
            for key, count in found:
                norm = K1 * (1 - B + B * self._lengths[key] / self._mean_length)
                scores[key] += rarity * count * (K1 + 1) / (count + norm)
        return sorted(scores, key=lambda key: (-scores[key], key))


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description="BM25 on the queries of a retrieval recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    args = parser.parse_args()
    loaded = load_recipe(args.recipe, check_files=False).recipe
    assert isinstance(loaded, RetrievalRecipe), "a retrieval recipe"
    judgements, _ = read_queries(loaded.data)
    index = Bm25({key: judgements.documents[key] for key in judgements.ranked(args.split)})
    scores = []
    for query in judgements.splits.named()[args.split]:
        excluded = frozenset(query.excluded)
        ranked = [key for key in index.ranked(query.text) if key not in excluded]
        scores.append(ranking_scores(ranked[:DEEP], query.relevance))
    print(
        f"{len(scores):,} queries: " + ", ".join(f"{name} {value:.4f}" for name, value in mean_scores(scores).items())
    )


if __name__ == "__main__":
    main()
