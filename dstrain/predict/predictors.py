"""A trained model ready to use: what it takes, and one JSON object for each of what it is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dstrain.errors import UserError
from dstrain.predict.loaded import GRAPH, Loaded, data_keys, load
from dstrain.recipe.data import QuestionAnsweringData, SentenceExtractionData, TokenClassificationData
from dstrain.recipe.definition import TASKS, imported
from dstrain.tasks.batching import batches_by_length, encoded, encoded_pairs, padded
from dstrain.tasks.question_answering import QuestionAnswering
from dstrain.tasks.sentences import best, joined, padded_sentences, sentence_scores, sentences_of, split_texts
from dstrain.tasks.sequence_to_sequence import source_ids
from dstrain.tasks.spans import NO_SPAN, best_spans, merged, span_rows
from dstrain.tasks.tags import OUTSIDE, entities, pieces_of_spans, pieces_of_words
from dstrain.tasks.text_pairs import written


class Predictor(Protocol):
    """What `dstrain predict` and its like need of a model."""

    fields: tuple[str, ...]  # what it takes, as records name it
    tokens_field: str | None  # a list of tokens or sentences that may stand in for its only field

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """One JSON object for each item, in order.

        Args:
            values: of each item, in the order of `fields`.
            batch_rows: most rows that share a batch.
        """


@dataclass(frozen=True)
class Prediction:
    """The most probable label of a text."""

    label: str
    probability: float


def model_predictor(folder: Path, precision: str = "fp32") -> Predictor:
    """The model of a Transformers folder. Raises UserError where nothing in it predicts.

    Args:
        folder: of the model.
        precision: of weights and arithmetic: fp32, or bf16, which is faster where the processor has it, and less exact.
    """
    loaded = load(folder)
    if precision == "bf16":
        if (folder / GRAPH).is_file():
            raise UserError(f"{folder} is an ONNX graph of fixed precision; use fp32, or the Transformers folder")
        loaded.model.bfloat16()
    predictor = TASKS[loaded.task].predictor
    if predictor is None:
        raise UserError(f"{folder} holds a model of {loaded.task}, which predicts nothing by itself; use Transformers")
    made: Predictor = imported(predictor)(loaded)
    return made


class TextClassifier:
    """One label of a text or a pair of texts, several, or a number."""

    fields: tuple[str, ...]
    tokens_field: str | None = None

    def __init__(self, source: Path | Loaded) -> None:
        """Load the folder. Raises UserError where it holds no such model."""
        loaded = load(source) if isinstance(source, Path) else source
        if loaded.task != "sequence_classification":
            raise UserError(f"{source} holds a {loaded.task} model without a classification head of texts")
        self._loaded, self.model, self.encoder, self.length = loaded, loaded.model, loaded.encoder, loaded.length
        self.labels: dict[int, str] = self.model.config.id2label
        pair = loaded.data.get("pair_field")
        self.fields = (loaded.data.get("text_field", "text"), *([pair] if pair else []))
        self.label_field: str = loaded.data.get("label_field", "label")
        self.min_confidence: float = loaded.data.get("min_confidence", 0.0)

    def predict(self, texts: list[str]) -> list[Prediction]:
        """The most probable label of texts, which share one batch. Longer ones are cut where training cut them."""
        return self.best([(text,) for text in texts], len(texts))

    def best(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[Prediction]:
        """The most probable label of each item, as `answers` takes them, however improbable it is."""
        logits = self._logits(values, batch_rows)
        best = logits.softmax(dim=-1).max(dim=-1)
        return [
            Prediction(self.labels[index], probability)
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: label and probability; or `labels`, those that are more probable than not; or `number`.

        The label is None where its probability is below `min_confidence`.
        """
        problem = self.model.config.problem_type
        if problem not in ("regression", "multi_label_classification"):
            return [
                {
                    "label": one.label if one.probability >= self.min_confidence else None,
                    "probability": round(one.probability, 6),
                }
                for one in self.best(values, batch_rows)
            ]
        logits = self._logits(values, batch_rows)
        if problem == "regression":
            return [{"number": round(number, 6)} for number in logits[:, 0].tolist()]
        return [{"labels": self._likely(row)} for row in logits.sigmoid().tolist()]

    def _likely(self, chances: list[float]) -> list[dict[str, Any]]:
        ordered = sorted(enumerate(chances), key=lambda pair: -pair[1])
        return [{"label": self.labels[at], "probability": round(chance, 6)} for at, chance in ordered if chance > 0.5]

    def _logits(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> Tensor:
        """fp32 (items, labels)."""
        if len(self.fields) == 2:
            pairs = [(first, second) for first, second in values]
            rows, starts = zip(*encoded_pairs(self.encoder, pairs, self.length, self._loaded.separators), strict=True)
        else:
            texts = (text for (text,) in values)
            rows, starts = (
                tuple(encoded(self.encoder, texts, self.length, self._loaded.data.get("truncation_side", "end"))),
                (),
            )
        found = torch.empty(len(rows), self.model.config.num_labels)
        for places, outputs in self._loaded.batches(rows, starts, batch_rows):
            found[places] = outputs.logits.float()
        return found


class TokenTagger:
    """A tag for each token that is given, or the entities of a text with the characters where they are."""

    def __init__(self, loaded: Loaded) -> None:
        """`loaded`: a token classifier."""
        data = TokenClassificationData(**data_keys(loaded, TokenClassificationData))
        self._loaded, self._data = loaded, data
        self._tags: dict[int, str] = loaded.model.config.id2label
        self.fields: tuple[str, ...] = ("text",)
        self.tokens_field: str | None = data.tokens_field

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: `tags` of a tuple of tokens, `entities` of a text, whose words are its tokenizer's."""
        encoder, data = self._loaded.encoder, self._data
        spans = [self._words(value) if isinstance(value, str) else [] for (value,) in values]
        found = [
            pieces_of_spans(encoder, [value], [words])[0]
            if isinstance(value, str)
            else pieces_of_words(encoder, [value], data.joiner)[0]
            for (value,), words in zip(values, spans, strict=True)
        ]
        stride = min(data.stride, (self._loaded.length - 2) // 2)
        shown = [
            (number, ids, pieces.owned(window))
            for number, pieces in enumerate(found)
            for ids, window in pieces.windows(encoder, self._loaded.length, stride)
        ]
        tags = [
            [OUTSIDE] * len(words if isinstance(value, str) else value)
            for (value,), words in zip(values, spans, strict=True)
        ]
        for places, outputs in self._loaded.batches([ids for _, ids, _ in shown], (), batch_rows):
            for place, chosen in zip(places, outputs.logits.argmax(dim=-1).numpy(), strict=True):
                number, _, (words_owned, tokens) = shown[place]
                for word, tag in zip(words_owned.tolist(), chosen[tokens].tolist(), strict=True):
                    tags[number][word] = self._tags[tag]
        return [
            {"entities": _entities(value, words, own)} if isinstance(value, str) else {"tags": own}
            for (value,), words, own in zip(values, spans, tags, strict=True)
        ]

    def _words(self, text: str) -> list[tuple[int, int]]:
        """Characters of each word of a text, as its tokenizer separates them."""
        encoding = self._loaded.encoder.tokenizer.encode(text, add_special_tokens=False)
        words: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            if word is not None and start < end:
                start += len(text[start:end]) - len(text[start:end].lstrip())
                words[word] = (min(start, words.get(word, (start, end))[0]), end)
        return list(words.values())


def _entities(text: str, words: list[tuple[int, int]], tags: list[str]) -> list[dict[str, Any]]:
    found = [(words[first][0], words[last - 1][1], kind) for first, last, kind in entities(tags[: len(words)])]
    return [{"type": kind, "text": text[start:end], "start": start, "end": end} for start, end, kind in found]


class AnswerFinder:
    """The answer to a question in a text, and the next best ones."""

    fields: tuple[str, ...]
    tokens_field: str | None = None

    def __init__(self, loaded: Loaded) -> None:
        """`loaded`: a question-answering model."""
        self._loaded, self._data = loaded, QuestionAnsweringData(**data_keys(loaded, QuestionAnsweringData))
        self.fields = (self._data.question_field, self._data.context_field)

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: `answer` (empty where the model may say so), its characters, its score, and `n_best`."""
        loaded, data = self._loaded, self._data
        rows = span_rows(
            loaded.encoder,
            [(question, context) for question, context in values],
            length=loaded.length,
            stride=data.stride,
            question_length=min(data.question_length, loaded.length // 2),
            separators=loaded.separators,
        )
        windows: list[list[tuple[float, list[tuple[int, int, float]]]]] = [[] for _ in values]
        starts = [row.window_start for row in rows]
        for places, outputs in loaded.batches([row.ids for row in rows], starts, batch_rows):
            logits = QuestionAnswering.logits_of(outputs).float().numpy().astype(np.float64)  # (rows, tokens, 2)
            for place, own in zip(places, logits, strict=True):
                row = rows[place]
                best = best_spans(row, own[:, 0], own[:, 1], data.n_best, data.max_answer_length)
                windows[row.question].append(best)
        return [self._answer(context, found) for (_, context), found in zip(values, windows, strict=True)]

    def _answer(self, context: str, found: list[tuple[float, list[tuple[int, int, float]]]]) -> dict[str, Any]:
        null, spans = merged(found, self._data.n_best)
        ranked = [
            {"answer": context[start:end], "start": start, "end": end, "score": round(score, 4)}
            for start, end, score in spans
        ]
        best_score = spans[0][2] if spans else NO_SPAN
        empty = {"answer": "", "start": 0, "end": 0, "score": round(null, 4)}
        nothing = not ranked or (self._data.unanswerable and null - best_score > self._data.null_threshold)
        return (empty if nothing else ranked[0]) | {"n_best": ranked}


class SentencePicker:
    """The sentences of a text that sum it up."""

    def __init__(self, loaded: Loaded) -> None:
        """`loaded`: a token classifier of one label, trained to find sentences."""
        self._loaded = loaded
        self._data = SentenceExtractionData(**data_keys(loaded, SentenceExtractionData))
        self.fields: tuple[str, ...] = (self._data.source_field,)
        self.tokens_field: str | None = self._data.source_field

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: the summary, under the name of training's targets, and the `numbers` of its sentences.

        Numbers are those of a tuple of sentences, or of a text as `sentences_of` splits it, from 0.
        """
        data = self._data
        texts = [sentences_of(value) if isinstance(value, str) else value for (value,) in values]
        rows = split_texts(self._loaded.encoder, texts, self._loaded.length)
        chosen: list[list[int]] = [[] for _ in rows]
        for places, outputs in self._loaded.batches([row.ids for row in rows], (), batch_rows):
            logits = outputs.logits[..., 0]  # (rows, tokens)
            part = [rows[place] for place in places]
            sentences = padded_sentences(part, logits.shape[1])
            scores = sentence_scores(logits, sentences, max(row.count for row in part)).double().numpy()
            for place, row, own in zip(places, part, scores, strict=True):
                chosen[place] = best(own[: row.count], data.sentences)
        return [
            {data.target_field: joined([text[number] for number in numbers], data.language), "numbers": numbers}
            for text, numbers in zip(texts, chosen, strict=True)
        ]


class TextWriter:
    """A translation or a summary of a text, or of a list of sentences."""

    def __init__(self, loaded: Loaded) -> None:
        """`loaded`: a model that writes text; how it searches is in the folder's generation_config.json."""
        self._loaded, self._prefix = loaded, str(loaded.data.get("source_prefix", ""))
        self.fields: tuple[str, ...] = (loaded.data.get("source_field", "text"),)
        self.tokens_field: str | None = self.fields[0]
        self._field = str(loaded.data.get("target_field", "written"))

    @torch.inference_mode()
    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: the text, under the name of training's targets. Texts of like length share a batch."""
        loaded = self._loaded
        sources = [value if isinstance(value, str) else " ".join(value) for (value,) in values]
        rows = source_ids(loaded.encoder, sources, self._prefix, loaded.length)
        texts = [""] * len(rows)
        for places in batches_by_length(rows, batch_rows):
            inputs = padded([rows[place] for place in places], loaded.encoder.pad_id, loaded.length, multiple=1)
            found = loaded.model.generate(**inputs)[:, 1:].numpy()
            for place, ids in zip(places, found, strict=True):
                texts[place] = written(loaded.encoder, ids)
        return [{self._field: text} for text in texts]
