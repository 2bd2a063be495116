"""Texts with what is to be written of them: translations, summaries. And ids as text again."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import WordPiece

from dstrain.data.tokens import DocumentTokenizer
from dstrain.examples.record import Record
from dstrain.recipe.data import TextPairData
from dstrain.tasks.sentences import sentences_of
from dstrain.tasks.splits import Parse, SplitReader, Splits, shown, text_problem

_WIDE = (
    "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"  # scripts and punctuation that have no spaces around them
)
_GAP = re.compile(rf"(?<=[{_WIDE}])\s+(?=[{_WIDE}])")


@dataclass(frozen=True)
class TextPair:
    """A source, its targets (references, the first of which is trained towards), and the line where it starts.

    `sentences` are the source's, as the file has them, or as its full stops say.
    """

    source: str
    targets: tuple[str, ...]
    line: int
    sentences: tuple[str, ...]


def read_text_pairs(data: TextPairData) -> tuple[Splits[TextPair], SplitReader]:
    """The pairs of all splits, and the reader that they came through.

    Raises:
        CorpusError: a file cannot be read, or has lines that are no pairs.
    """
    needed = {data.source_field: "data.source_field", data.target_field: "data.target_field"}
    reader = SplitReader(data, needed)
    parse = _parser(data)
    return reader.splits(parse, lambda _train: parse, lambda pair: pair.source.strip()), reader


def _parser(data: TextPairData) -> Parse[TextPair]:
    def parse(record: Record) -> TextPair | str:
        sentences = _texts(record.fields[data.source_field])
        if sentences is None:
            given = shown(record.fields[data.source_field])
            return f"{data.source_field} is {given}, neither text nor a list of sentences; write one of them"
        source = " ".join(sentences)
        problem = text_problem(source, data.source_field, data.longest_text)
        if problem:
            return problem
        targets = _texts(record.fields[data.target_field])
        if targets is None:
            given = shown(record.fields[data.target_field])
            return f"{data.target_field} is {given}, neither text nor a list of references; write one of them"
        for target in targets or ("",):
            problem = text_problem(target, data.target_field, data.longest_text)
            if problem:
                return problem
        if isinstance(record.fields[data.source_field], str):
            sentences = sentences_of(source)
        return TextPair(source, targets, record.line, tuple(one for one in sentences if one.strip()))

    return parse


def _texts(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


def written(encoder: DocumentTokenizer, ids: NDArray[np.int64]) -> str:
    """The text of ids, up to where it ends and without specials.

    A WordPiece vocabulary does not say where spaces were: it gives none between Chinese or Japanese characters.
    """
    ended = np.flatnonzero(ids == encoder.sep_id)
    kept = ids[: ended[0]] if len(ended) else ids
    text = str(encoder.tokenizer.decode([one for one in kept.tolist() if one not in encoder.special_ids])).strip()
    return _GAP.sub("", text) if isinstance(encoder.tokenizer.model, WordPiece) else text
