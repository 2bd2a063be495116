"""How good written text is: BLEU and chrF by sacrebleu, ROUGE by rouge-score; and what one gets without any model.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) run from 0 to 100, ROUGE's F1 (Lin 2004) from 0 to 1, as their
libraries have them. `signature` says how sacrebleu counted (Post 2018).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dstrain.tasks.sentences import BY_CHARACTERS, joined, words_of
from dstrain.tasks.text_pairs import TextPair

ROUGES = ("rouge1", "rouge2", "rougeL")

Scored = tuple[dict[str, float], dict[str, str], list[dict[str, Any]]]  # metrics, signatures, what each example got
Write = Callable[[TextPair], str]


class Judge:
    """Scores texts written of the examples of a split. Baselines are worked out once for each split."""

    def __init__(
        self,
        score: Callable[[Sequence[str], Sequence[Sequence[str]], str], Scored],
        language: str,
        baselines: Mapping[str, Write],
        ceilings: Mapping[str, Write] = MappingProxyType({}),
    ) -> None:
        """How to judge.

        Args:
            score: `bleu_scores` or `rouge_scores`.
            language: of the texts.
            baselines: by name, what one can write without a model.
            ceilings: by name, what only those can write who know the targets; shown beside the baselines.
        """
        self._score, self._language, self._baselines, self._ceilings = score, language, baselines, ceilings
        self._simple: dict[str, dict[str, dict[str, float]]] = {}  # by split

    def scores(self, split: str, pairs: Sequence[TextPair], texts: Sequence[str]) -> dict[str, Any]:
        """Metrics, those of the best baseline as `baseline_…`, and for reports `report` and `judged`.

        Args:
            split: its name.
            pairs: its examples.
            texts: what was written of each.
        """
        references = [pair.targets for pair in pairs]
        found, signatures, judged = self._score(texts, references, self._language)
        if split not in self._simple:
            self._simple[split] = {
                name: self._score([write(pair) for pair in pairs], references, self._language)[0]
                for name, write in {**self._baselines, **self._ceilings}.items()
            }
        simple, main = self._simple[split], next(iter(found))
        best = max((simple[name] for name in self._baselines), key=lambda one: one[main])
        scores = found | {f"baseline_{name}": value for name, value in best.items()}
        report = scores | {"baselines": simple, "signature": signatures}
        return scores | {"report": report, "judged": judged}


def summary_baselines(language: str, sentences: int = 1) -> dict[str, Write]:
    """What a summary of so many sentences is compared with."""
    name = "the source's first sentence" if sentences == 1 else f"the source's first {sentences} sentences"
    return {name: lambda pair: joined(pair.sentences[:sentences], language)}


def translation_baselines(train_targets: Sequence[str]) -> dict[str, Write]:
    """What a translation is compared with. `train_targets`: of data.train."""
    counts = Counter(train_targets)
    most_frequent = min(counts, key=lambda text: (-counts[text], text))
    return {
        "the source as it is": lambda pair: pair.source,
        "the most frequent target of data.train": lambda _pair: most_frequent,
    }


def bleu_scores(texts: Sequence[str], references: Sequence[Sequence[str]], language: str) -> Scored:
    """Corpus BLEU and chrF.

    Args:
        texts: what was written.
        references: of each, one or more.
        language: of both; Chinese is split by sacrebleu's `zh`, other languages without spaces by characters.
    """
    from sacrebleu.metrics import BLEU, CHRF

    tokenize = "zh" if language == "zh" else "char" if language in BY_CHARACTERS else "13a"
    bleu = BLEU(tokenize=tokenize)
    chrf = CHRF()
    most = max(map(len, references))
    streams = [[of_one[k] if k < len(of_one) else None for of_one in references] for k in range(most)]
    found = {"bleu": bleu.corpus_score(texts, streams).score, "chrf": chrf.corpus_score(texts, streams).score}
    signatures = {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
    by_sentence = BLEU(tokenize=tokenize, effective_order=True)  # else it warns of short ones
    judged = []
    letters = chrf._extract_corpus_statistics(texts, streams)  # which has no public name
    for text, of_one, counts in zip(texts, references, letters, strict=True):
        part = by_sentence.sentence_score(text, list(of_one))
        words = [*part.counts, *part.totals, part.sys_len, part.ref_len]
        similarity = chrf.sentence_score(text, list(of_one)).score / 100
        judged.append({"predicted": text, "badness": 1 - similarity, "sums": {"bleu": words, "chrf": counts}})
    return found, signatures, judged


def rouge_scores(texts: Sequence[str], references: Sequence[Sequence[str]], language: str) -> Scored:
    """Mean F1 of ROUGE-1, -2 and -L; of several references the best one counts, for each of the three.

    English words are stemmed, as rouge-score does it by default; other languages are not, and are split at what is no
    letter, or into characters.

    Args:
        texts: what was written.
        references: of each, one or more.
        language: of both.
    """
    from rouge_score.rouge_scorer import RougeScorer

    english = language == "en"
    scorer = RougeScorer(ROUGES, use_stemmer=english, tokenizer=None if english else Words(language))
    each = [
        {name: float(score.fmeasure) for name, score in scorer.score_multi(list(of_one), text).items()}
        for text, of_one in zip(texts, references, strict=True)
    ]
    means = {name: sum(one[name] for one in each) / len(each) for name in ROUGES}
    judged = [
        {"predicted": text, "badness": 1 - sum(one.values()) / len(one), "scores": one}
        for text, one in zip(texts, each, strict=True)
    ]
    how = "Porter stems" if english else "characters" if language in BY_CHARACTERS else "words"
    return means, {"rouge": f"rouge-score F1, {how}, best of the references"}, judged


class Words:
    """rouge-score's own tokenizer knows the letters a to z; this one splits any language, or into characters."""

    def __init__(self, language: str) -> None:
        self._language = language

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in lower case."""
        return words_of(text, self._language)
