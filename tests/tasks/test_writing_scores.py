"""Scores of written text against the libraries' own, in English and in Chinese, and what needs no model."""

import pytest

from dstrain.report.intervals import intervals
from dstrain.tasks.text_pairs import TextPair
from dstrain.tasks.writing_scores import (
    Judge,
    bleu_scores,
    rouge_scores,
    summary_baselines,
    translation_baselines,
)

TEXTS = ["the red apple falls from the tree", "a dog sleeps", "nothing at all"]
REFERENCES = [("the red apple falls off the tree", "a red apple falls"), ("a dog is sleeping",), ("something else",)]


def test_bleu_and_chrf_are_those_of_sacrebleu_with_any_number_of_references() -> None:
    import sacrebleu

    found, signatures, judged = bleu_scores(TEXTS, REFERENCES, "en")
    streams = [[one[0] for one in REFERENCES], [REFERENCES[0][1], None, None]]
    assert found == {
        "bleu": sacrebleu.corpus_bleu(TEXTS, streams).score,
        "chrf": sacrebleu.corpus_chrf(TEXTS, streams).score,
    }
    assert 10 < found["bleu"] < 90
    assert signatures["bleu"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert [one["predicted"] for one in judged] == TEXTS
    assert judged[0]["badness"] < judged[2]["badness"]


def test_the_intervals_of_bleu_and_chrf_are_around_them() -> None:
    texts = [f"{TEXTS[0]} and then number {n} {'sleeps' if n % 3 else 'runs'}" for n in range(40)]
    references = [(f"{REFERENCES[0][0]} and then number {n} sleeps",) for n in range(40)]
    found, _, judged = bleu_scores(texts, references, "en")
    for name, interval in intervals(judged).items():
        assert interval.value == pytest.approx(found[name])
        assert interval.low < interval.value < interval.high < interval.low + 20
    found, _, judged = bleu_scores(TEXTS, REFERENCES, "en")  # of several references the best counts
    assert {name: one.value for name, one in intervals(judged).items()} == pytest.approx(found)
    found, _, judged = bleu_scores(["a b c x y"], [("a b c d e",)], "en")  # no run of four words is right
    assert found["bleu"] > 0
    assert intervals(judged)["bleu"].value == pytest.approx(found["bleu"])


def test_chinese_is_scored_by_characters() -> None:
    found, signatures, _ = bleu_scores(["什么是 Access2Base?"], [("什么是Access2Base？",)], "zh")
    assert "|tok:zh|" in signatures["bleu"]
    spaced, _, _ = bleu_scores(["什 么 是 Access2Base ?"], [("什么是Access2Base？",)], "zh")
    assert found["bleu"] == spaced["bleu"] > 50, "spaces between characters change nothing"
    assert bleu_scores(["什么是"], [("什么是这个",)], "en")[0]["bleu"] < 1e-6, "as one word it is another word"
    rouge, said, _ = rouge_scores(["我喜欢红苹果 X12"], [("我喜欢苹果 X12",)], "zh")
    assert rouge["rouge1"] == pytest.approx(2 * 6 / (7 + 6))
    assert rouge["rouge2"] == pytest.approx(2 * 4 / (6 + 5))
    assert rouge["rougeL"] == pytest.approx(2 * 6 / (7 + 6))
    assert "characters" in said["rouge"]


def test_rouge_is_that_of_rouge_score_and_the_best_reference_counts() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found, _, judged = rouge_scores(TEXTS, REFERENCES, "en")
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)
        for text, references in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert found["rougeL"] == pytest.approx(sum(best) / 3)
    assert [one["scores"]["rougeL"] for one in judged] == pytest.approx(best)
    assert rouge_scores(["a dog sleeping"], [("a dog sleeps",)], "en")[0]["rouge1"] == 1.0, "stems"
    assert rouge_scores(["über große Äpfel"], [("Über große Äpfel",)], "de")[0]["rouge2"] == 1.0, "umlauts are letters"


def test_what_needs_no_model_is_scored_beside_it() -> None:
    dog, cat = "a dog runs over the wet grass", "a cat sleeps on the warm roof"
    pairs = [
        TextPair(source, (target,), line, (source,))
        for line, (source, target) in enumerate([("Ein Hund.", dog), (cat, cat), ("x", dog)], start=1)
    ]
    scores = Judge(bleu_scores, "en", translation_baselines([dog, "b", dog])).scores("valid", pairs, [dog, cat, dog])
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    baselines = scores["report"]["baselines"]
    assert set(baselines) == {"the source as it is", "the most frequent target of data.train"}
    assert scores["baseline_bleu"] == max(one["bleu"] for one in baselines.values()) > 0
    known = {"what was asked for": lambda pair: pair.targets[0]}
    judge = Judge(rouge_scores, "en", summary_baselines("en"), known)
    summaries = judge.scores("test", pairs, [dog, cat, dog])
    assert summaries["baseline_rouge1"] == pytest.approx(1 / 3), "a ceiling is no baseline"
    assert list(summaries["report"]["baselines"]) == ["the source's first sentence", "what was asked for"]
    assert summaries["report"]["baselines"]["what was asked for"]["rouge2"] == 1


def test_the_first_sentences_are_a_baseline() -> None:
    pair = TextPair("One. Two. Three.", ("-",), 1, ("One.", "Two.", "Three."))
    ((name, write),) = summary_baselines("en", 2).items()
    assert (name, write(pair)) == ("the source's first 2 sentences", "One. Two.")
    assert summary_baselines("zh", 2).popitem()[1](pair) == "One.Two."
