#!/usr/bin/env python
"""Cranfield in its SMART format → corpus.jsonl, queries.jsonl and train.tsv, valid.tsv, test.tsv, as BEIR has them.

    python tools/cranfield.py data/cranfield build/cranfield

Two traps. `cranqrel` numbers queries by their place in `cran.qry`, not by their `.I`. And its codes go down as
relevance goes up: 1 is a complete answer, 4 of minimum interest; the scores here are 5 − code. Lines of code −1, about
one for each query, are outside of that scale and left out.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

SPLITS = {"train": range(125), "valid": range(125, 150), "test": range(150, 225)}  # places of the queries drawn
STEP = 97  # coprime to 225: place i is query i × 97 mod 225, so that neighbours, often alike, are spread


def smart_records(path: Path) -> Iterator[dict[str, str]]:
    """The records of a SMART file, each a mapping of its field letters (I, T, W, …) to text on one line."""
    record: dict[str, list[str]] = {}
    letter = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(".I"):
            if record:
                yield {key: " ".join(" ".join(parts).split()) for key, parts in record.items()}
            record, letter = {"I": [line[2:]]}, "I"
        elif len(line) >= 2 and line[0] == "." and line[1] in "TABWX" and not line[2:].strip():
            letter = line[1]
            record[letter] = []
        else:
            record.setdefault(letter, []).append(line)
    if record:
        yield {key: " ".join(" ".join(parts).split()) for key, parts in record.items()}


def convert(source: Path, out: Path) -> dict[str, int]:
    """Write the files and return how much each holds."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = [
        {"id": record["I"], "text": record.get("W") or record.get("T") or "(empty)"}
        for record in smart_records(source / "cran.all.1400")
    ]
    queries = [
        {"id": str(place), "text": record["W"]} for place, record in enumerate(smart_records(source / "cran.qry"), 1)
    ]
    judged: dict[str, list[tuple[str, int]]] = {}
    for line in (source / "cranqrel").read_text().splitlines():
        query, document, code = line.split()[:3]
        if int(code) > 0:
            judged.setdefault(query, []).append((document, 5 - int(code)))
    counts = {}
    for name, records in (("corpus", corpus), ("queries", queries)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        counts[name] = len(records)
    for name, places in SPLITS.items():
        chosen = [str(place * STEP % len(queries) + 1) for place in places]
        lines = [f"{query}\t{document}\t{score}" for query in chosen for document, score in judged.get(query, [])]
        (out / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
        counts[name] = len(lines)
    return counts


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: cranfield.py SOURCE OUT")
    for what, count in convert(Path(sys.argv[1]), Path(sys.argv[2])).items():
        print(f"{what}: {count:,}")
