"""Bi- and cross-encoders from the files to the answers: trained, resumed, exported, indexed, searched, mined."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from ranks import run_ranks
from searched import live, recipe_text, records, write_queries
from sklearn.metrics import ndcg_score

from dstrain.cli import main
from dstrain.errors import CorpusError
from dstrain.plan.text import make_plan
from dstrain.predict.load_predictor import load_predictor
from dstrain.predict.search import Index
from dstrain.recipe.data import RetrievalData
from dstrain.recipe.definition import definition_of
from dstrain.recipe.load import load_recipe
from dstrain.report.page import read_predictions
from dstrain.tasks.calibration import calibration
from dstrain.tasks.queries import read_queries
from dstrain.tasks.rank_scores import ranking_scores

TREC = {"ndcg_10": "ndcg_cut_10", "mrr_10": "recip_rank", "recall_10": "recall_10", "recall_100": "recall_100"}


def test_measures_are_those_of_trec_eval() -> None:
    draw = random.Random(1)
    documents = [f"d{number}" for number in range(150)]
    for _ in range(200):
        judged = draw.sample(documents, draw.randint(1, 40))
        relevance = {key: draw.choice([0, 1, 2, 3]) for key in judged} | {judged[0]: 1}
        ranked = draw.sample(documents, draw.randint(1, 150))
        found = ranking_scores(ranked, {key: float(score) for key, score in relevance.items()})
        measures = {"ndcg_cut_10", "recall_10", "recall_100", "recip_rank"}
        run = {key: float(-place) for place, key in enumerate(ranked)}
        said = pytrec_eval.RelevanceEvaluator({"q": relevance}, measures).evaluate({"q": run})["q"]
        first_ten = pytrec_eval.RelevanceEvaluator({"q": relevance}, measures).evaluate(
            {"q": {key: run[key] for key in ranked[:10]}}
        )["q"]
        expected = {name: (first_ten if name == "mrr_10" else said)[theirs] for name, theirs in TREC.items()}
        assert found == pytest.approx(expected, abs=1e-9)
        if len(ranked) == len(documents):
            true = [[relevance.get(key, 0) for key in ranked]]
            assert found["ndcg_10"] == pytest.approx(ndcg_score(true, [list(range(150, 0, -1))], k=10))
    assert set(ranking_scores(["d1"], {"d1": 0.0}).values()) == {0.0}


# ---------------------------------------------------------------- files


def data(folder: Path, **keys: Any) -> RetrievalData:
    """Two queries by id, in the layout of BEIR."""
    files = {
        "corpus.jsonl": '{"_id": "a", "title": "Red", "text": "apple"}\n{"_id": 7, "title": "", "text": "sky"}\n'
        '{"_id": "c", "title": "Of", "text": "leaf"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "fruit"}\n{"_id": "q2", "text": "air"}\n{"_id": "q3", "text": "oak"}\n',
        "train.tsv": "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\t7\t0\nq2\t7\t1\nq1\tc\t1\n",
        "valid.tsv": "query-id\tcorpus-id\tscore\nq3\tc\t1\n",
    }
    for name, text in files.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    given: dict[str, Any] = {
        "train": str(folder / "train.tsv"),
        "valid": str(folder / "valid.tsv"),
        "corpus": str(folder / "corpus.jsonl"),
        "queries": str(folder / "queries.jsonl"),
        "id_field": "_id",
        "title_field": "title",
        "query_field": "query-id",
        "positive_field": "corpus-id",
        "score_field": "score",
        "sequence_length": 16,
    }
    return RetrievalData(**(given | keys))


def test_queries_by_id_are_put_together(tmp_path: Path) -> None:
    found, _ = read_queries(data(tmp_path))
    first, second = found.splits.train
    assert (first.text, first.relevance, first.relevant) == ("fruit", {"a": 2, "7": 0, "c": 1}, ["a", "c"])
    assert (second.id, second.line) == ("q2", 4)
    assert found.documents == {"a": "Red apple", "7": "sky", "c": "Of leaf"}
    assert found.ranked("valid") == ["a", "7", "c"]


def test_pairs_in_texts_need_no_corpus(tmp_path: Path) -> None:
    lines = "query,positive,negatives\nred,apple,sky\nred,leaf,\nblue,sky,apple\ngreen,leaf,apple\n"
    (tmp_path / "pairs.csv").write_text(lines)
    keys = {"query_field": "query", "positive_field": "positive", "score_field": None, "negatives_field": "negatives"}
    keys |= {
        "train": str(tmp_path / "pairs.csv"),
        "valid": None,
        "validation_split": 1,
        "corpus": None,
        "queries": None,
    }
    found, _ = read_queries(data(tmp_path, **keys))
    assert (len(found.splits.train), len(found.splits.valid)) == (2, 1)
    red = next(query for part in found.splits.named().values() for query in part if query.text == "red")
    assert (red.relevant, red.negatives) == (["apple", "leaf"], ("sky",))
    (held,) = found.splits.valid
    assert found.ranked("valid") == [*held.relevant, *held.negatives]
    assert held.drawn_negatives(held.relevant[0], 3, seed=0) == list(held.negatives)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("train.tsv", "query-id\tcorpus-id\nq1\ta\n", "train.tsv:1: has no column 'score'"),
        ("train.tsv", "query-id\tcorpus-id\tscore\nq9\ta\t1\n", "train.tsv:2: query-id='q9' is not in data.queries="),
        ("train.tsv", "query-id\tcorpus-id\tscore\nq1\tx\t1\n", "train.tsv:2: corpus-id='x' is not in data.corpus="),
        ("train.tsv", "query-id\tcorpus-id\tscore\nq1\ta\tgood\n", "train.tsv:2: score is 'good'; write a number"),
        (
            "train.tsv",
            "query-id\tcorpus-id\tscore\nq1\ta\t-1\n",
            "train.tsv:2: score is '-1'; write a number, 0 or more",
        ),
        ("train.tsv", "query-id\tcorpus-id\tscore\nq1\ta\t0\n", "no query has a document with a score above 0"),
        (
            "corpus.jsonl",
            '{"_id": "a", "title": "", "text": "x"}\n{"_id": "a", "title": "", "text": "y"}\n',
            "is there twice",
        ),
        ("corpus.jsonl", '{"_id": "a", "title": "", "text": " "}\n', "corpus.jsonl:1: text is empty"),
        ("corpus.jsonl", '{"_id": 1.5, "title": "", "text": "x"}\n', "_id is 1.5; write a text or a whole number"),
        ("queries.jsonl", '{"id": "a", "text": "x"}\n', "has no field '_id'; did you mean 'id'?"),
        ("queries.jsonl", "", "no text in it"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError) as caught:
        read_queries(data(tmp_path))
    assert says in str(caught.value)


def test_negatives_that_nobody_has_are_missed(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no record has a field 'hard'"):
        read_queries(data(tmp_path, negatives_field="hard"))


# ---------------------------------------------------------------- trained and used


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_queries(tmp_path_factory.mktemp("searched"))


def evaluated(run_dir: Path) -> dict[str, Any]:
    """The last evaluation of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "valid_loss" in line)


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def scores_by_id(results: list[dict[str, Any]]) -> dict[str, float]:
    return {each["id"]: each["score"] for each in results}


def relevance(record: dict[str, Any]) -> dict[str, float]:
    return dict.fromkeys(record["positive"] if isinstance(record["positive"], list) else [record["positive"]], 1.0)


@pytest.fixture(scope="module")
def bi_encoder(folder: Path) -> Path:
    """The folder of a run of six steps."""
    (folder / "bi.yaml").write_text(recipe_text(folder, architecture="roberta"))
    ((weights,),) = run_ranks(1, live, folder / "bi.yaml", folder / "bi", [6], ["pooling=cls"])
    plan = make_plan(load_recipe(folder / "bi.yaml").recipe, 1, None)
    assert plan.total_parameters == sum(int(np.size(value)) for value in weights.values())
    assert main(["export", str(folder / "bi")]) == 0
    return folder / "bi"


@pytest.fixture(scope="module")
def cross_encoder(folder: Path) -> Path:
    """The folder of a run of six steps, in two parts."""
    (folder / "cross.yaml").write_text(recipe_text(folder, task="ranking", architecture="roberta"))
    ((_, resumed),) = run_ranks(1, live, folder / "cross.yaml", folder / "cross", [3, 6], [])
    ((whole,),) = run_ranks(1, live, folder / "cross.yaml", folder / "cross-whole", [6], [])
    assert all(np.array_equal(whole[name], value) for name, value in resumed.items())
    plan = make_plan(load_recipe(folder / "cross.yaml").recipe, 1, None)
    assert plan.total_parameters == sum(int(np.size(value)) for value in whole.values())
    assert main(["export", str(folder / "cross")]) == 0
    return folder / "cross"


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    """The documents that the valid split is ranked over, with ids."""
    documents: dict[str, None] = {}
    for record in records()[2:7]:
        documents |= dict.fromkeys((*relevance(record), *record["negatives"]))
    lines = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "corpus.jsonl"


@pytest.mark.ranks
def test_an_index_finds_what_the_evaluation_found(
    folder: Path, bi_encoder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("numpy", []), ("faiss", ["--faiss"])):
        assert main(["index", str(bi_encoder), str(corpus), "--out", str(folder / name), *options]) == 0
    capsys.readouterr()
    valid = records()[2:7]
    answers = {}
    for name in ("numpy", "faiss"):
        assert main(["search", str(folder / name), str(folder / "valid.jsonl"), "--top", "100"]) == 0
        answers[name] = said(capsys)
    for line, other in zip(answers["numpy"], answers["faiss"], strict=True):
        assert scores_by_id(line["results"]) == pytest.approx(scores_by_id(other["results"]), abs=1e-5)
        assert [each["score"] for each in line["results"]] == sorted(
            scores_by_id(line["results"]).values(), reverse=True
        )
    scores = [
        ranking_scores([each["text"] for each in line["results"]], relevance(record))
        for line, record in zip(answers["numpy"], valid, strict=True)
    ]
    evaluation = evaluated(bi_encoder)
    for name in TREC:
        assert name in definition_of("ranking").measures and name in definition_of("retrieval").measures
        assert evaluation[f"valid_{name}"] == pytest.approx(np.mean([each[name] for each in scores])), name
    assert main(["predict", str(bi_encoder), str(corpus)]) == 0
    lines = said(capsys)
    vectors = np.array([line["embedding"] for line in lines])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(lines)), abs=1e-5)
    assert np.array(Index.open(folder / "numpy").vectors) == pytest.approx(vectors, abs=1e-5)
    served = load_predictor(folder / "numpy")
    (found,) = served.answers([(valid[0]["query"],)], 4)
    first_ten = scores_by_id(answers["numpy"][0]["results"][:10])
    assert (served.fields, scores_by_id(found["results"])) == (("query",), pytest.approx(first_ten, abs=1e-5))
    assert main(["report", str(bi_encoder), "--html", str(folder / "report.html")]) == 0
    page = (folder / "report.html").read_text()
    assert all(each in page for each in ("ndcg 10", '<td class="text">popularity</td>', "Worst examples"))
    assert "Calibration" not in page


@pytest.mark.ranks
def test_onnx_makes_the_same_vectors(bi_encoder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    assert main(["export", str(bi_encoder), "--onnx"]) == 0
    capsys.readouterr()
    for model in (bi_encoder, bi_encoder / "onnx"):
        assert main(["predict", str(model), str(corpus)]) == 0
        found.append(np.array([line["embedding"] for line in said(capsys)]))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.ranks
def test_a_cross_encoder_puts_what_was_found_in_order(
    folder: Path, bi_encoder: Path, cross_encoder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valid = records()[2:7]
    pairs = [
        {"query": record["query"], "document": text, "id": number}
        for number, record in enumerate(valid)
        for text in dict.fromkeys((*relevance(record), *record["negatives"]))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    capsys.readouterr()
    assert main(["predict", str(cross_encoder), str(folder / "pairs.jsonl"), "--batch-rows", "3"]) == 0
    lines = said(capsys)
    scores = []
    for number, record in enumerate(valid):
        own = sorted((line for line in lines if line["id"] == number), key=lambda line: -line["score"])
        scores.append(ranking_scores([line["document"] for line in own], relevance(record)))
    evaluation = evaluated(cross_encoder)
    for name in TREC:
        assert name in definition_of("ranking").measures and name in definition_of("retrieval").measures
        assert evaluation[f"valid_{name}"] == pytest.approx(np.mean([each[name] for each in scores])), name
    as_given = evaluation["valid_report"]["baselines"]["as given"]["ndcg_10"]
    assert evaluation["valid_as_given_ndcg_10"] == as_given == 1.0, "a document of its own comes first in the file"

    out = folder / "for-reranking"
    assert main(["index", str(bi_encoder), str(corpus), "--out", str(out)]) == 0
    capsys.readouterr()
    query = valid[0]["query"]
    (folder / "one.txt").write_text(query + "\n")
    assert main(["search", str(out), str(folder / "one.txt"), "--rerank", str(cross_encoder), "--top", "3"]) == 0
    (line,) = said(capsys)
    texts = [json.loads(each)["text"] for each in corpus.read_text().splitlines()]
    direct = load_predictor(cross_encoder / "export").answers([(query, text) for text in texts], 8)
    best = sorted(zip(texts, direct, strict=True), key=lambda pair: -pair[1]["score"])[:3]
    assert [each["score"] for each in line["results"]] == pytest.approx([each["score"] for _, each in best], abs=1e-4)
    assert [each["text"] for each in line["results"]] == [text for text, _ in best]
    for command, says in (
        (["search", str(out), str(folder / "one.txt"), "--rerank", str(bi_encoder)], "is no cross-encoder"),
        (["search", str(folder), str(folder / "one.txt")], "is no index"),
        (["index", str(cross_encoder), str(corpus), "--out", str(folder / "no")], "makes no vectors of texts"),
        (["index", str(bi_encoder), str(corpus), "--out", str(out)], "exists and is not an empty folder"),
        (["index", str(bi_encoder), str(corpus), "--out", str(folder / "no"), "--faiss", "X9"], "--faiss X9"),
        (["index", str(bi_encoder), str(corpus), "--out", str(folder / "no"), "--batch-rows", "0"], "--batch-rows 0"),
        (["search", str(out), str(folder / "one.txt"), "--top", "0"], "give 1 document at least"),
        (["mine", str(folder / "bi.yaml"), "--index", str(out), "--out", str(folder)], "Is a directory"),
        (["mine", str(folder / "bi.yaml"), "--index", str(out), "--out", "x", "--split", "test"], "has no data.test"),
    ):
        assert main(command) == 2
        assert says in capsys.readouterr().err
    assert not (folder / "no").exists()


@pytest.mark.ranks
def test_mined_candidates_are_trained_against(
    folder: Path, bi_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = sorted({text for record in records() for text in (*relevance(record), *record["negatives"])})
    ids = {text: f"d{number}" for number, text in enumerate(texts)}
    (folder / "all.jsonl").write_text("".join(json.dumps({"id": ids[text], "text": text}) + "\n" for text in texts))
    lines = [
        {"query": record["query"], "positive": [ids[text] for text in relevance(record)], "score": 2}
        for record in records()
    ]
    (folder / "by-id.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["index", str(bi_encoder), str(folder / "all.jsonl"), "--out", str(folder / "mined-index")]) == 0
    keys = [
        f"data.train={folder}/by-id.jsonl",
        f"data.valid={folder}/by-id.jsonl",
        f"data.corpus={folder}/all.jsonl",
        "data.score_field=score",
        "data.negatives_field=null",
    ]
    out = folder / "mined.jsonl"
    arguments = [*keys, "--index", str(folder / "mined-index"), "--out", str(out), "--top", "4"]
    assert main(["mine", str(folder / "bi.yaml"), *arguments]) == 0
    capsys.readouterr()
    mined = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["query"], line["score"]) for line in mined] == [(line["query"], 2) for line in lines]
    assert {len(line["candidates"]) for line in mined} == {4}
    searcher = load_predictor(folder / "mined-index")
    (found,) = searcher.answers([(mined[0]["query"],)], 4)
    assert mined[0]["candidates"] == [each["id"] for each in found["results"][:4]]
    again = [f"data.train={out}", "data.candidates_field=candidates", "data.negatives=3", *keys[1:]]
    overrides = [*again, "loss.kind=pointwise"]
    ((weights,),) = run_ranks(1, live, folder / "cross.yaml", folder / "mined", [3], overrides)
    assert all(np.isfinite(value).all() for value in weights.values())
    report = evaluated(folder / "mined")["valid_report"]
    bins, _ = calibration(read_predictions(folder / "mined", "valid"))
    assert sum(each.predictions for each in bins) == report["pairs"]
    assert all(0.5 <= each.confidence <= 1.0 for each in bins)
    assert report["pairs"] == sum(
        len(set(line["positive"])) for line in {each["query"]: each for each in lines}.values()
    )
    judged, _ = read_queries(load_recipe(folder / "bi.yaml", again).recipe.data)  # type: ignore[arg-type]
    for query in judged.splits.train:
        drawn = query.drawn_negatives(query.relevant[0], 3, seed=3)
        assert drawn and set(drawn) <= set(query.candidates) - set(query.relevant)
