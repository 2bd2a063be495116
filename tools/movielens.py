#!/usr/bin/env python
"""MovieLens → corpus.jsonl and train.jsonl, valid.jsonl, test.jsonl: which film does somebody like next?

    python tools/movielens.py data/ml_latest_small build/movies [--plots data/movie_plots_1000/movie_summaries.json]

A document is a film: title, year, genres, and where it is known the beginning of its plot. A query is what a user liked
(4 stars or more) last before some moment, the newest first; its document is what the user liked next. Of each user the
last film is for the test, the one before it is held out, some before these are trained on. `seen` are films that the
user rated before that moment: they are not ranked.
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

LIKED = 4.0  # stars
HISTORY = 5  # films of a query
LEAST_HISTORY = 2
TRAINED = 8  # queries of a user, the latest
PLOT_CHARACTERS = 160


def plain_title(title: str) -> str:
    """`Godfather, The (1972)` and `The Godfather (1972 film)` as `the godfather`."""
    title = re.sub(r"\s*\([^()]*\)", "", title).strip()
    title = re.sub(r"^(.*), (The|A|An)$", r"\2 \1", title)
    return " ".join(title.lower().split())


def films(folder: Path, plots: Path | None) -> dict[str, dict[str, str]]:
    """By id of the film its title and the text that describes it."""
    known: dict[str, str] = {}
    if plots is not None:
        known = {plain_title(title): text for title, text in json.loads(plots.read_text(encoding="utf-8")).items()}
    found = {}
    with (folder / "movies.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            year = re.search(r"\((\d{4})\)\s*$", row["title"])
            title = re.sub(r"^(.*), (The|A|An)$", r"\2 \1", re.sub(r"\s*\(\d{4}\)\s*$", "", row["title"]))
            genres = "" if row["genres"].startswith("(no") else row["genres"].replace("|", ", ").lower()
            plot = " ".join(known.get(plain_title(row["title"]), "").split())[:PLOT_CHARACTERS]
            parts = [f"{title} ({year.group(1)})" if year else title, genres, plot]
            found[row.get("movieId") or row["Id"]] = {"title": title, "text": ". ".join(filter(None, parts))}
    return found


def queries(folder: Path, by_id: dict[str, dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each split."""
    rated: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
    with (folder / "ratings.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rated[row["userId"]].append((int(row["timestamp"]), row.get("movieId") or row["Id"], float(row["rating"])))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    for user in rated.values():
        user.sort()
        records, liked, seen = [], [], []
        for _, film, stars in user:
            if stars >= LIKED:
                if len(liked) >= LEAST_HISTORY:
                    titles = [by_id[one]["title"] for one in liked[: -HISTORY - 1 : -1]]
                    records.append({"query": "; ".join(titles), "positive": film, "seen": list(seen)})
                liked.append(film)
            seen.append(film)
        if len(records) < 3:
            continue
        splits["test"].append(records[-1])
        splits["valid"].append(records[-2])
        splits["train"] += records[-2 - TRAINED : -2]
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description="MovieLens as queries and documents.")
    parser.add_argument("source", type=Path, help="the folder of movies.csv and ratings.csv")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--plots", type=Path, help="a JSON object of titles and plots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    by_id = films(args.source, args.plots)
    corpus = [{"id": film, "text": about["text"]} for film, about in by_id.items()]
    for name, records in {"corpus": corpus, **queries(args.source, by_id)}.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(records):,}")


if __name__ == "__main__":
    main()
