"""The converters of raw data sets: what they make of a small sample with the traps of the real one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def convert(tool: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / tool, *arguments], check=True, capture_output=True)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_queries_of_cranfield_are_numbered_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "cran.all.1400").write_text(
        ".I 1\n.T\na wing\n.A\nsmith\n.B\nj. ae.\n.W\na wing\nin air .\n.I 2\n.T\nheat\n.A\n.B\n.W\n"
        ".I 3\n.T\n.A\n.B\n.W\n"
    )
    numbers = [1 + 3 * place for place in range(225)]  # gaps, as in the real file
    (tmp_path / "cran.qry").write_text("".join(f".I {n:03}\n.W\nquestion {n}\nand .\n" for n in numbers))
    (tmp_path / "cranqrel").write_text("2 1  1 \n2 2 4 \n2 3 -1\n4 2 2\n225 1 3\n")
    convert("cranfield.py", tmp_path, tmp_path / "out")
    corpus = records(tmp_path / "out" / "corpus.jsonl")
    assert corpus == [
        {"id": "1", "text": "a wing in air ."},
        {"id": "2", "text": "heat"},
        {"id": "3", "text": "(empty)"},
    ]
    queries = {record["id"]: record["text"] for record in records(tmp_path / "out" / "queries.jsonl")}
    assert (len(queries), queries["2"]) == (225, "question 4 and .")
    lines = [
        line
        for split in ("train", "valid", "test")
        for line in (tmp_path / "out" / f"{split}.tsv").read_text().splitlines()[1:]
    ]
    assert sorted(lines) == ["2\t1\t4", "2\t2\t1", "225\t1\t2", "4\t2\t3"]


def test_nobody_is_asked_for_a_film_before_its_time(tmp_path: Path) -> None:
    titles = [
        '"Godfather, The (1972)"',
        "Alien (1979)",
        "Heat (1995)",
        "Up (2009)",
        "Big (1988)",
        "Fargo (1996)",
        "Zulu",
    ]
    lines = [f"{number},{title},Crime|Drama" for number, title in enumerate(titles, start=1)]
    (tmp_path / "movies.csv").write_text("Id,title,genres\n" + "\n".join(lines) + "\n")
    stars = [(3, 5.0, 30), (1, 4.0, 10), (2, 4.5, 20), (4, 2.0, 35), (5, 4.0, 40), (6, 5.0, 50)]
    ratings = [f"1,{film},{star},{time}" for film, star, time in stars] + ["2,1,5.0,1", "2,2,5.0,2"]
    (tmp_path / "ratings.csv").write_text("userId,Id,rating,timestamp\n" + "\n".join(ratings) + "\n")
    (tmp_path / "plots.json").write_text(json.dumps({"The Godfather (film)": "A family.", "Zulu": "A battle."}))
    convert("movielens.py", tmp_path, tmp_path / "out", "--plots", tmp_path / "plots.json")
    corpus = {record["id"]: record["text"] for record in records(tmp_path / "out" / "corpus.jsonl")}
    assert corpus["1"] == "The Godfather (1972). crime, drama. A family."
    assert (corpus["2"], corpus["7"]) == ("Alien (1979). crime, drama", "Zulu. crime, drama. A battle.")
    splits = {name: records(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert splits == {
        "train": [{"query": "Alien; The Godfather", "positive": "3", "seen": ["1", "2"]}],
        "valid": [{"query": "Heat; Alien; The Godfather", "positive": "5", "seen": ["1", "2", "3", "4"]}],
        "test": [{"query": "Big; Heat; Alien; The Godfather", "positive": "6", "seen": ["1", "2", "3", "4", "5"]}],
    }
