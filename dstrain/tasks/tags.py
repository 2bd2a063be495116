"""Tagged words: how they are read, which tags a scheme has, and where a word's pieces are in a text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import CorpusError
from dstrain.examples.record import Record
from dstrain.recipe.data import SCHEME_PREFIXES, TokenClassificationData
from dstrain.tasks.splits import Parse, SplitReader, Splits, meant, shown
from dstrain.tasks.windows import Window, windows

OUTSIDE = "O"


@dataclass(frozen=True)
class Sentence:
    """Words, a tag for each, and the line on which they start."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int


def read_sentences(data: TokenClassificationData) -> tuple[list[str], Splits[Sentence], SplitReader]:
    """The tags, O first, in the order of the head's outputs; the examples; and the reader that they came through.

    The tags are those of the scheme for every type that `train` has, whether or not each prefix occurs there.

    Raises:
        CorpusError: a file cannot be read, has lines that are no examples, or types that the training file lacks.
    """
    needed = {data.tokens_field: "data.tokens_field", data.tags_field: "data.tags_field"}
    reader = SplitReader(data, needed, data.token_pattern)
    types = list(data.labels)

    def known(train: list[Sentence]) -> Parse[Sentence]:
        if not types:
            types.extend(sorted({type_of(tag) for sentence in train for tag in sentence.tags if tag != OUTSIDE}))
        if not types:
            raise CorpusError(f"{data.train}: every tag is O; give examples with entities (data.tags_field)")
        return _with_known_types(data, types, data.train)

    first = _with_known_types(data, types, "data.labels") if types else _parser(data)
    splits = reader.splits(first, known, lambda sentence: sentence.words)
    return scheme_tags(types, data.scheme), splits, reader


def scheme_tags(types: Iterable[str], scheme: str) -> list[str]:
    """O, and each type with each prefix."""
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in SCHEME_PREFIXES[scheme])]


def type_of(tag: str) -> str:
    """`person` of `B-person`."""
    return tag.partition("-")[2]


def _with_known_types(data: TokenClassificationData, types: list[str], source: str) -> Parse[Sentence]:
    parse = _parser(data)

    def judged(record: Record) -> Sentence | str:
        found = parse(record)
        for tag in () if isinstance(found, str) else found.tags:
            if tag != OUTSIDE and type_of(tag) not in types:
                return f"the type {type_of(tag)!r} of {tag} does not occur in {source}" + meant(
                    type_of(tag), types, "; did you mean {!r}?", "; add training examples of it, or drop this one"
                )
        return found

    return judged


def _parser(data: TokenClassificationData) -> Parse[Sentence]:
    prefixes = SCHEME_PREFIXES[data.scheme]

    def parse(record: Record) -> Sentence | str:
        words, tags = record.fields[data.tokens_field], record.fields[data.tags_field]
        for name, value in ((data.tokens_field, words), (data.tags_field, tags)):
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                return f"{name} is {shown(value)}, not a list of texts; write [a, b]"
        if not "".join(words).strip():
            return f"{data.tokens_field} is empty; write the tokens, or drop the line"
        if len(words) != len(tags):
            return f"has {len(words)} {data.tokens_field} and {len(tags)} {data.tags_field}; give each token one tag"
        if sum(map(len, words)) > data.longest_text:
            return (
                f"{data.tokens_field} has {sum(map(len, words)):,} characters, more than data.longest_text="
                f"{data.longest_text}; put blank lines between sentences, or raise data.longest_text"
            )
        for tag in tags:
            if tag != OUTSIDE and not (tag[:1] in prefixes and tag[1:2] == "-" and tag[2:]):
                return (
                    f"the tag {tag!r} is not of the scheme {data.scheme}, whose tags are O and "
                    f"{', '.join(f'{prefix}-TYPE' for prefix in prefixes)}; set data.scheme, or correct the tag"
                )
        return Sentence(tuple(words), tuple(tags), record.line)

    return parse


# ---------------------------------------------------------------- words and their pieces


@dataclass(frozen=True)
class Pieces:
    """The token ids of a text without specials, and for each word that has any, its number and its first piece."""

    ids: NDArray[np.int32]
    words: NDArray[np.int64]
    first_pieces: NDArray[np.int64]

    def windows(self, encoder: DocumentTokenizer, length: int, stride: int) -> list[tuple[NDArray[np.int32], Window]]:
        """Rows of at most `length` tokens, specials included, with the pieces that each shows and owns."""
        found = windows(len(self.ids), length - 2, stride)
        return [
            (np.array([encoder.cls_id, *self.ids[one.start : one.stop], encoder.sep_id], np.int32), one)
            for one in found
        ]

    def owned(self, window: Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of the words whose first piece a window owns, and where in its row that piece is."""
        mine = (self.first_pieces >= window.first) & (self.first_pieces < window.last)
        return self.words[mine], self.first_pieces[mine] - window.start + 1


def pieces_of_words(encoder: DocumentTokenizer, sentences: Sequence[Sequence[str]], joiner: str) -> list[Pieces]:
    """The pieces of sentences given as words, which are encoded as one text: the words with `joiner` between them."""
    texts, spans = [], []
    for words in sentences:
        ends = np.cumsum([len(word) + len(joiner) for word in words]) - len(joiner)
        spans.append([(int(end) - len(word), int(end)) for word, end in zip(words, ends, strict=True)])
        texts.append(joiner.join(words))
    return pieces_of_spans(encoder, texts, spans)


def pieces_of_spans(
    encoder: DocumentTokenizer, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[Pieces]:
    """The pieces of texts, and which of them begins each word.

    A piece belongs to the word that its first character within any word is of: tokenizers may count the space before a
    word as part of the piece.

    Args:
        encoder: the tokenizer.
        texts: to encode.
        spans: for each text, the characters of its words: first, last + 1.
    """
    found = []
    for text, words, encoding in zip(
        texts, spans, encoder.tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
    ):
        word_of = np.full(len(text) + 1, -1, np.int64)
        for number, (start, end) in enumerate(words):
            word_of[start:end] = number
        first_pieces: dict[int, int] = {}
        for piece, (start, end) in enumerate(encoding.offsets):
            inside = next((int(word) for word in word_of[start:end] if word >= 0), None)
            if inside is not None:
                first_pieces.setdefault(inside, piece)
        numbers = sorted(first_pieces)
        places = np.array([first_pieces[number] for number in numbers], np.int64)
        found.append(Pieces(np.array(encoding.ids, np.int32), np.array(numbers, np.int64), places))
    return found


def shown_tags(words: Sequence[str], tags: Sequence[str]) -> str:
    """The words that have a tag other than O, for people."""
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True) if tag != OUTSIDE) or "no entity"


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """The entities that tags spell: first word, last word + 1, type. Read as leniently as seqeval and CoNLL do.

    An entity goes on while the type stays and no word begins anew, so that I without B is an entity too.
    """
    found: list[tuple[int, int, str]] = []
    start = kind = None
    for at, tag in enumerate([*tags, OUTSIDE]):
        prefix, own = tag[:1], type_of(tag)
        if start is not None and (tag == OUTSIDE or prefix in "BS" or own != kind):
            found.append((start, at, str(kind)))
            start = None
        if tag != OUTSIDE and start is None:
            start, kind = at, own
        if start is not None and prefix in "ES":
            found.append((start, at + 1, str(kind)))
            start = None
    return found


def tag_scores(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], tags: Sequence[str]
) -> dict[str, Any]:
    """Precision, recall and F1 of whole entities by seqeval; and under `report` the scores of tokens, O included.

    `judged` lacks `predicted`, which takes the words.

    Args:
        true: the tags of each sentence.
        predicted: the same, as predicted.
        tags: every tag of the scheme.
    """
    from seqeval.metrics import classification_report as entity_report
    from seqeval.metrics import f1_score, precision_score, recall_score
    from sklearn.metrics import classification_report as token_report

    pair = [[["I" + tag[1:] if tag[:1] == "M" else tag for tag in one] for one in side] for side in (true, predicted)]
    scores: dict[str, Any] = {
        "precision": float(precision_score(*pair, zero_division=0)),
        "recall": float(recall_score(*pair, zero_division=0)),
        "f1": float(f1_score(*pair, zero_division=0)),
    }
    flat_true, flat_predicted = ([tag for sentence in side for tag in sentence] for side in (true, predicted))
    right = sum(one == other for one, other in zip(flat_true, flat_predicted, strict=True))
    scores["token_accuracy"] = right / max(len(flat_true), 1)
    by_type = entity_report(*pair, output_dict=True, zero_division=0) if any(map(entities, true)) else {}
    report = scores | {
        "entities": {
            kind: {
                "precision": float(row["precision"]),
                "recall": float(row["recall"]),
                "f1": float(row["f1-score"]),
                "entities": int(row["support"]),
            }
            for kind, row in by_type.items()
        },
        "token_report": token_report(flat_true, flat_predicted, labels=list(tags), digits=3, zero_division=0.0),
    }
    judged: list[dict[str, Any]] = []
    for there, here in zip(*pair, strict=True):
        wanted, found = set(entities(there)), set(entities(here))
        hits = len(wanted & found)
        sums = {
            "precision": [hits, len(found)],
            "recall": [hits, len(wanted)],
            "f1": [2 * hits, len(found) + len(wanted)],
            "token_accuracy": [sum(tag == own for tag, own in zip(there, here, strict=True)), len(there)],
        }
        judged.append({"badness": len(wanted ^ found), "sums": sums})  # missed and invented
    return scores | {"report": report, "judged": judged}
