"""Queries with the documents that answer them: pairs or triples of texts, or ids of a corpus, as BEIR has them.

    corpus.jsonl       {"id": "184", "text": …}                         data.corpus
    queries.jsonl      {"id": "1", "text": …}                           data.queries
    train.tsv          query-id  corpus-id  score                       data.train; a line each, or lists in JSONL

Without `data.corpus` a document is its text, without `data.queries` a query is its own. Lines of one query are one
example.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dstrain.base.counter_rng import permutation, stream_key
from dstrain.errors import CorpusError
from dstrain.examples.record import Record
from dstrain.examples.records import Reading, half_character, records_of
from dstrain.recipe.data import RetrievalData
from dstrain.tasks.splits import Parse, SplitReader, Splits, meant, refuse, shown, text_problem

SHOWN, SHOWN_CHARACTERS = 3, 80  # documents of a ranking in reports
MOST_COMPARED = 1000  # ids that a wrong one is compared with


@dataclass(frozen=True)
class Query:
    """A query and what is known of documents, by their keys: ids of the corpus, or texts where there is none."""

    id: str
    text: str
    line: int
    relevance: Mapping[str, float]  # of the judged documents; 0 is not relevant
    negatives: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def relevant(self) -> list[str]:
        """The documents that answer it, in the file's order."""
        return [key for key, score in self.relevance.items() if score > 0]

    def drawn_negatives(self, positive: str, most: int, seed: int) -> list[str]:
        """Some of its negatives, and of its candidates that are not relevant, drawn anew for each document it has."""
        known = {*self.relevant, *self.excluded}
        listed = [key for key in dict.fromkeys((*self.negatives, *self.candidates)) if key not in known]
        drawn = permutation(stream_key(seed, "negatives", self.id, positive), len(listed))
        return [listed[place] for place in sorted(drawn[:most].tolist())]

    def mentioned(self) -> Iterable[str]:
        """Every document that its records name."""
        return dict.fromkeys((*self.relevance, *self.negatives, *self.candidates))


@dataclass(frozen=True)
class Judgements:
    """The queries of all splits, and the text of each document by its key. `corpus`: whether all of them are ranked."""

    splits: Splits[Query]
    documents: Mapping[str, str]
    corpus: bool

    def ranked(self, split: str) -> list[str]:
        """The documents that a split's queries are ranked over."""
        if self.corpus:
            return list(self.documents)
        return list(dict.fromkeys(key for query in self.splits.named()[split] for key in query.mentioned()))

    def shown(self, keys: Sequence[str]) -> str:
        """The first of some documents, for people."""
        return " | ".join(self.documents[key][:SHOWN_CHARACTERS] for key in keys[:SHOWN])


def read_queries(data: RetrievalData) -> tuple[Judgements, SplitReader]:
    """The queries of all splits with their documents, and the reader that they came through.

    Raises:
        CorpusError: a file cannot be read, has lines that are no examples, or ids that the corpus lacks.
    """
    documents = read_texts(data, data.corpus, "data.corpus", data.title_field) if data.corpus is not None else None
    queries = read_texts(data, data.queries, "data.queries", None) if data.queries is not None else None
    named = ("query_field", "positive_field", "score_field")
    reader = SplitReader(data, {getattr(data, key): f"data.{key}" for key in named if getattr(data, key) is not None})
    parse = _parser(data, documents, queries)
    splits = reader.splits(parse, lambda _train: parse, lambda query: query.text, merged)
    if not any(query.relevant for query in splits.train):
        raise CorpusError(f"{data.train}: no query has a document with a score above 0; correct {data.score_field}")
    if data.negatives_field is not None and not any(query.negatives for query in splits.train):
        raise CorpusError(
            f"{data.train}: no record has a field {data.negatives_field!r} (data.negatives_field); add it"
        )
    if data.candidates_field is not None and not any(
        query.candidates for part in splits.named().values() for query in part
    ):
        raise CorpusError(
            f"{data.train}: no record has a field {data.candidates_field!r} (data.candidates_field); add it"
        )
    for name, part in (("valid", splits.valid), ("test", splits.test)):
        without = sum(not query.relevant for query in part)
        if without:
            reader.notes.append(f"data.{name}: {without:,} of {len(part):,} queries have no relevant document, score 0")
    texts = documents or {key: key for part in splits.named().values() for query in part for key in query.mentioned()}
    return Judgements(splits, texts, documents is not None), reader


def read_texts(data: RetrievalData, location: str, key: str, title_field: str | None) -> dict[str, str]:
    """Texts by id, from `data.corpus` or `data.queries`, with the title before them where there is a field of it.

    Raises:
        CorpusError: a file cannot be read, a text is missing or empty, or an id is there twice.
    """
    needed = {data.id_field: "data.id_field", data.text_field: "data.text_field"}
    needed |= {title_field: "data.title_field"} if title_field is not None else {}
    texts: dict[str, str] = {}
    mistakes: list[str] = []
    for record in records_of(location, Reading(encoding=data.encoding), needed):
        found = record.problem or _missing(record, needed) or _text(record, data, title_field)
        if isinstance(found, str):
            mistakes.append(f"{record.place}: {found}")
            continue
        name, text = found
        if name in texts:
            mistakes.append(f"{record.place}: {data.id_field}={name!r} is there twice; give each an id of its own")
        texts[name] = text
    refuse(mistakes)
    if not texts:
        raise CorpusError(f"{key}={location}: no text in it; give one a line")
    return texts


def merged(queries: list[Query]) -> list[Query]:
    """One for each query, with the documents of all its records."""
    found: dict[str, Query] = {}
    for query in queries:
        first = found.get(query.id)
        if first is None:
            found[query.id] = query
            continue
        lists: dict[str, Any] = {
            name: tuple(dict.fromkeys((*getattr(first, name), *getattr(query, name))))
            for name in ("negatives", "candidates", "excluded")
        }
        found[query.id] = replace(first, relevance={**first.relevance, **query.relevance}, **lists)
    return list(found.values())


# ---------------------------------------------------------------- one record


def _missing(record: Record, needed: Mapping[str, str]) -> str | None:
    for name in needed:
        if name not in record.fields:
            return f"has no field {name!r}" + meant(name, record.fields, "; did you mean {!r}?", "; add it")
    return None


def _text(record: Record, data: RetrievalData, title_field: str | None) -> tuple[str, str] | str:
    names = [data.text_field] if title_field is None else [title_field, data.text_field]
    parts = [record.fields[name] for name in names]
    text = " ".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    name = _id(record.fields[data.id_field])
    if name is None:
        return f"{data.id_field} is {shown(record.fields[data.id_field])}; write a text or a whole number"
    half = half_character(text)
    if half:
        return f"{data.text_field} {half}"
    return text_problem(text, data.text_field, data.longest_text) or (name, text)


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


@dataclass(frozen=True)
class _Problem:
    words: str


def _parser(
    data: RetrievalData, documents: Mapping[str, str] | None, queries: Mapping[str, str] | None
) -> Parse[Query]:
    """What makes a query of a record, with the documents which that record names."""
    document = _keys_of(documents, f"data.corpus={data.corpus}", data.longest_text)
    question = _keys_of(queries, f"data.queries={data.queries}", data.longest_text)

    def parse(record: Record) -> Query | str:
        names: dict[str, tuple[str, ...]] = {}
        wanted = {"query": data.query_field, "relevant": data.positive_field}
        wanted |= {
            name: key
            for name, key in (
                ("negatives", data.negatives_field),
                ("candidates", data.candidates_field),
                ("excluded", data.exclude_field),
            )
            if key is not None
        }
        for name, key in wanted.items():
            if record.fields.get(key) in (None, "") and name not in ("query", "relevant"):
                continue  # a record may have none of these
            keys = (question if name == "query" else document)(record.fields[key], key)
            if isinstance(keys, _Problem):
                return keys.words
            names[name] = keys
        if len(names["query"]) != 1:
            return f"{data.query_field} names {len(names['query'])} queries; write one"
        if not names["relevant"]:
            return f"{data.positive_field} is empty; name the document that answers the query, or drop the line"
        score = 1.0 if data.score_field is None else _score(record.fields[data.score_field])
        if score is None:
            return f"{data.score_field} is {shown(record.fields[data.score_field or ''])}; write a number, 0 or more"
        (query,) = names.pop("query")
        relevance = dict.fromkeys(names.pop("relevant"), score)
        text = query if queries is None else queries[query]
        return Query(query, text, record.line, relevance, **names)

    return parse


def _keys_of(
    texts: Mapping[str, str] | None, source: str, longest: int
) -> Callable[[Any, str], tuple[str, ...] | _Problem]:
    """Reads a field that names one text or a list of them: by id where `texts` are given, else the texts themselves."""

    def keys(value: Any, name: str) -> tuple[str, ...] | _Problem:
        found = []
        for each in value if isinstance(value, list | tuple) else [value]:
            key = each if texts is None else _id(each)
            problem = None
            if texts is None:
                problem = text_problem(key, name, longest)
            elif key is None:
                problem = f"{name} is {shown(each)}; write an id of {source}"
            elif key not in texts:
                problem = f"{name}={key!r} is not in {source}" + meant(
                    key, list(texts)[:MOST_COMPARED], "; did you mean {!r}?", "; add it there, or drop the line"
                )
            if problem:
                return _Problem(problem)
            assert isinstance(key, str)
            found.append(key.strip())
        return tuple(dict.fromkeys(found))

    return keys


def _score(value: Any) -> float | None:
    try:
        score = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) and score >= 0 else None
