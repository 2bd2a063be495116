"""How good written text is: BLEU and chrF by sacrebleu, ROUGE by rouge-score; and what one gets without any model.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) run from 0 to 100, ROUGE's F1 (Lin 2004) from 0 to 1, as their
libraries have them. `signature` says how sacrebleu counted (Post 2018).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dstrain.recipe.schema import SequenceToSequenceData
from dstrain.tasks.text_pairs import TextPair

BY_CHARACTERS = ("zh", "ja", "th")  # languages whose words have no spaces between them
ROUGES = ("rouge1", "rouge2", "rougeL")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_WORDS = re.compile(r"\w+")
_CHARACTERS = re.compile(r"[a-z0-9]+|[^\W_]")  # a run of Latin letters or digits counts as one


class Judge:
    """Scores texts written of the examples of a split. Baselines are worked out once for each split."""

    def __init__(self, data: SequenceToSequenceData, train_targets: Sequence[str]) -> None:
        """`train_targets`: of data.train, the most frequent of which is a baseline of translation."""
        self._data, self._score = data, (bleu_scores if data.target == "translation" else rouge_scores)
        counts = Counter(train_targets)
        self._most_frequent = min(counts, key=lambda text: (-counts[text], text))
        self._baselines: dict[str, dict[str, dict[str, float]]] = {}  # by split

    def scores(self, split: str, pairs: Sequence[TextPair], texts: Sequence[str]) -> dict[str, Any]:
        """Metrics, those of the best baseline as `baseline_…`, and for reports `report` and `judged`.

        Args:
            split: its name.
            pairs: its examples.
            texts: what was written of each.
        """
        references = [pair.targets for pair in pairs]
        found, signatures, judged = self._score(texts, references, self._data.language)
        if split not in self._baselines:
            self._baselines[split] = self._baselines_of(pairs)
        baselines = self._baselines[split]
        main = next(iter(found))
        best = max(baselines.values(), key=lambda one: one[main])
        scores = found | {f"baseline_{name}": value for name, value in best.items()}
        report = scores | {"baselines": baselines, "signature": signatures}
        return scores | {"report": report, "judged": judged}

    def _baselines_of(self, pairs: Sequence[TextPair]) -> dict[str, dict[str, float]]:
        simple: dict[str, Callable[[TextPair], str]] = {"the source's first sentence": first_sentence}
        if self._data.target == "translation":
            simple = {
                "the source as it is": lambda pair: pair.source,
                "the most frequent target of data.train": lambda _pair: self._most_frequent,
            }
        references = [pair.targets for pair in pairs]
        return {
            name: self._score([write(pair) for pair in pairs], references, self._data.language)[0]
            for name, write in simple.items()
        }


def first_sentence(pair: TextPair) -> str:
    """As the file says, or up to the first full stop with a space after it."""
    return pair.lead if pair.lead is not None else _SENTENCE_END.split(pair.source.strip(), maxsplit=1)[0]


Scored = tuple[dict[str, float], dict[str, str], list[dict[str, Any]]]  # metrics, signatures, what each example got


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
    for text, of_one in zip(texts, references, strict=True):
        part = by_sentence.sentence_score(text, list(of_one))
        counts = [*part.counts, *part.totals, part.sys_len, part.ref_len]
        similarity = chrf.sentence_score(text, list(of_one)).score / 100
        judged.append({"predicted": text, "scores": {"sentence_chrf": similarity}, "bleu_counts": counts})
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
    judged = [{"predicted": text, "scores": one} for text, one in zip(texts, each, strict=True)]
    how = "Porter stems" if english else "characters" if language in BY_CHARACTERS else "words"
    return means, {"rouge": f"rouge-score F1, {how}, best of the references"}, judged


class Words:
    """rouge-score's own tokenizer knows the letters a to z; this one splits any language, or into characters."""

    def __init__(self, language: str) -> None:
        self._pattern = _CHARACTERS if language in BY_CHARACTERS else _WORDS

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in lower case."""
        return self._pattern.findall(text.lower())
