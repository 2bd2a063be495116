"""Retrieval: queries and documents as unit vectors of one encoder, near to each other where they belong together.

A row of training is a query with a document that answers it and some that do not. Every other document of the global
batch is a negative too, unless it is known to answer the query: exactly so on any ranks, see `contrastive.py`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dstrain.model.encoder import build_model
from dstrain.model.pooling import AutoEncoder, pooled
from dstrain.recipe.schema import RetrievalRecipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.batching import Ids, encoded, padded
from dstrain.tasks.contrastive import contrast, negatives_of
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.queries import Judgements, Query, read_queries
from dstrain.tasks.rank_scores import DEEP, judged_ranking, list_losses, mean_scores, ranking_scores
from dstrain.tasks.splits import SplitReader, Splits
from dstrain.tasks.task import Inputs, StepBatch, seeded_micro_batches

POOLING = Path("1_Pooling") / "config.json"  # as sentence-transformers names it
QUERIES_AT_ONCE = 256  # whose similarities to all documents are in memory


@dataclass(frozen=True)
class PairRow(Row):
    """A query, its document and some negatives. `ids` has all of them end to end, `target` their numbers."""

    query: Ids | None = None
    documents: tuple[Ids, ...] = ()  # the query's own first


class BiEncoder(Head):
    """An encoder of queries and documents. `outputs` are unit vectors, fp32 (queries + documents, hidden_size)."""

    def __init__(self, model: PreTrainedModel, pooling: str) -> None:
        super().__init__(model)
        self._pooling = pooling

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        document_ids: Tensor | None = None,
        document_mask: Tensor | None = None,
        gradients: Tensor | None = None,
        losses: Tensor | None = None,
        right: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses and number of rows whose document came first, both fp32 scalars; 0 without `losses`.

        Args:
            input_ids: of queries, int64 (queries, tokens); where nothing is trained, of any texts.
            attention_mask: the same shape.
            document_ids: of the queries' documents, int64 (documents, tokens).
            document_mask: the same shape.
            gradients: of the global batch's loss by each vector, fp32 (queries + documents, hidden_size).
            losses: of each query in the global batch, fp32 (queries,).
            right: whether its document came first there, fp32 (queries,).
        """
        vectors = self.embed(input_ids, attention_mask)
        if document_ids is not None and document_mask is not None:
            vectors = torch.cat([vectors, self.embed(document_ids, document_mask)])
        self.outputs = vectors.detach()
        if gradients is None or losses is None or right is None:
            nothing = torch.zeros((), device=vectors.device)
            return nothing, nothing
        product = (vectors * gradients).sum()  # its gradient is that of the loss, its value means nothing
        return product - product.detach() + losses.sum(), right.sum()

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors of texts, fp32 (texts, hidden_size)."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(hidden, attention_mask, self._pooling)


class Retrieval(ExampleTask[Query]):
    """The `retrieval` task on one rank."""

    auto_model = AutoEncoder
    _recipe: RetrievalRecipe
    _judgements: Judgements

    def __init__(self, recipe: RetrievalRecipe, runtime: Runtime) -> None:
        super().__init__(recipe, runtime)
        self._identity["data"] |= recipe.data.model_dump(mode="json", include={"query_length", "negatives"})

    def read(self) -> tuple[Splits[Query], SplitReader]:
        """See `ExampleTask`."""
        self._judgements, reader = read_queries(self._recipe.data)
        return self._judgements.splits, reader

    def build(self) -> Head:
        """See `ExampleTask`."""
        recipe = self._recipe
        model = build_model(recipe.model, recipe.train.seed, self.encoder.special_token_ids, auto=self.auto_model)
        return BiEncoder(model, recipe.pooling)

    # ------------------------------------------------------------ training

    def make_rows(self, split: str, examples: list[Query]) -> list[Row]:
        """See `ExampleTask`: of training a row for each document of a query; else each text once, queries first."""
        data = self._recipe.data
        queries = encoded(self.encoder, (query.text for query in examples), data.query_length)
        if split != "train":
            texts = [*queries, *(self._document_ids(key) for key in self._judgements.ranked(split))]
            size = self.module.model.config.hidden_size
            return [Row(ids, np.zeros(0), 0, size, targets=0) for ids in texts]
        rows: list[Row] = []
        for number, (query, ids) in enumerate(zip(examples, queries, strict=True)):
            for key in query.relevant:
                keys = (key, *query.drawn_negatives(key, data.negatives, data.seed))
                documents = tuple(map(self._document_ids, keys))
                target = np.array([number, *(self._number_of_text[self._text(key)] for key in keys)], np.int64)
                rows.append(PairRow(np.concatenate([ids, *documents]), target, number, 0, 1, 0, ids, documents))
        return rows

    def _text(self, key: str) -> str:
        return self._judgements.documents[key]

    def _document_ids(self, key: str) -> Ids:
        """Token ids of a document; `key` may be of any split."""
        return self._document_rows[self._number_of_text[self._text(key)]]

    @cached_property
    def _number_of_text(self) -> dict[str, int]:
        """Documents by text: two with the same text are one."""
        return {text: number for number, text in enumerate(dict.fromkeys(self._judgements.documents.values()))}

    @cached_property
    def _document_rows(self) -> list[Ids]:
        return encoded(self.encoder, self._number_of_text, self._recipe.data.sequence_length)

    @cached_property
    def _known(self) -> list[frozenset[int]]:
        """By number of a training query, the documents that are no negatives of it."""
        return [
            frozenset(self._number_of_text[self._text(key)] for key in (*query.relevant, *query.excluded))
            for query in self.splits.train
        ]

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """See `ExampleTask`: of texts, or of queries and all their documents end to end."""
        data, pad_id = self._recipe.data, self.encoder.pad_id
        queries = [row.query if isinstance(row, PairRow) and row.query is not None else row.ids for row in rows]
        inputs = padded(queries, pad_id, data.sequence_length)
        documents = [ids for row in rows if isinstance(row, PairRow) for ids in row.documents]
        if documents:
            batch = padded(documents, pad_id, data.sequence_length)
            inputs |= {"document_ids": batch["input_ids"], "document_mask": batch["attention_mask"]}
        return {name: tensor.to(self.runtime.device) for name, tensor in inputs.items()}

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """Rows have no labels: a query's document is right among those of its batch."""
        raise NotImplementedError

    def completed(self, batches: Sequence[StepBatch]) -> Sequence[StepBatch]:
        """See `Task`: each micro-batch gets the losses of its rows in the global batch, and what they hand down."""
        step, loss = batches[0].data_step, self._recipe.loss
        rows = self._chosen(0, 1, step)[1]  # of the whole global batch
        layout = _Layout(self.first_row(step), rows)
        vectors = torch.zeros(layout.texts, self.model.config.hidden_size, device=self.runtime.device)
        with torch.no_grad():
            for batch in batches:
                micro_batches = seeded_micro_batches(batch, self._recipe.train.seed)
                for micro_batch, (_, places) in zip(micro_batches, layout.places(batch), strict=True):
                    self.runtime.engine(**micro_batch.inputs)
                    if len(micro_batch.row_numbers):
                        vectors[places] = self.module.outputs
        vectors = self.runtime.all_reduce_sum_tensor(vectors)  # each is 0 but on one rank, so that sums are exact
        found = contrast(
            vectors[: len(rows)],
            vectors[len(rows) :],
            layout.first_documents,
            negatives_of([self._known[row.example] for row in rows], layout.documents),
            offsets=self._offsets(rows, layout)
            if loss.log_q_correction
            else np.zeros(len(layout.documents), np.float32),
            temperature=loss.temperature,
            symmetric=loss.symmetric,
        )
        gradients = torch.cat([found.query_gradients, found.document_gradients])
        return [
            replace(
                batch,
                micro_batches=[
                    micro_batch.with_inputs(gradients=gradients[all_], losses=found.losses[own], right=found.right[own])
                    for micro_batch, (own, all_) in zip(batch.micro_batches, layout.places(batch), strict=True)
                ],
            )
            for batch in batches
        ]

    def _offsets(self, rows: Sequence[Row], layout: "_Layout") -> NDArray[np.float32]:
        """(documents of the global batch,): of a row's own document minus the logarithm of how often the batch has it.

        That is its share of the training rows × the rows of the batch. The negatives of a row were not drawn: 0.
        """
        train = self.rows["train"]
        counts = np.array([self._counts[int(row.target[1])] for row in rows])
        offsets = np.zeros(len(layout.documents), np.float32)
        offsets[layout.first_documents] = -np.log(counts * len(rows) / len(train))
        return offsets

    @cached_property
    def _counts(self) -> Counter[int]:
        """By number of a document, of how many training rows it is the own one."""
        return Counter(int(row.target[1]) for row in self.rows["train"])

    # ------------------------------------------------------------ evaluation

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: the vectors."""
        return list(self.module.outputs.cpu().numpy().astype(np.float64))

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`. The loss is that of each query against all documents that are ranked."""
        queries, keys = self.splits.named()[split], self._judgements.ranked(split)
        vectors = np.stack(answers).astype(np.float32)
        documents = vectors[len(queries) :].T
        place_of = {key: place for place, key in enumerate(keys)}
        popular = self._popularity(keys)
        losses: list[float] = []
        judged: list[dict[str, Any]] = []
        by_popularity: list[dict[str, float]] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            similarities = vectors[start : start + len(part)] @ documents
            for query, own in zip(part, similarities, strict=True):
                excluded = frozenset(query.excluded)
                hidden = [place_of[key] for key in excluded if key in place_of]
                own[hidden] = -np.inf
                order = np.argsort(-own, kind="stable")[: min(DEEP, len(keys) - len(hidden))]
                ranked = [keys[place] for place in order]
                shown = self._judgements.shown(ranked)
                judged.append({"predicted": shown, **judged_ranking(ranked, query.relevance)})
                wanted = [place_of[key] for key in query.relevant if key not in excluded]
                losses += list_losses(own / self._recipe.loss.temperature, wanted)
                popular_here = islice((key for key in popular if key not in excluded), DEEP)
                by_popularity.append(ranking_scores(list(popular_here), query.relevance))
        means = mean_scores([each["scores"] for each in judged])
        usual = mean_scores(by_popularity)
        report = means | {"documents": len(keys), "baselines": {"popularity": usual}}
        baseline = {"popularity_ndcg_10": usual["ndcg_10"]}
        return {"loss": float(np.mean(losses or [0.0])), **means, **baseline, "report": report, "judged": judged}

    def _popularity(self, keys: Sequence[str]) -> list[str]:
        """What ranking without looking at the query gives: documents by how many training queries they answer."""
        counts = dict.fromkeys(keys, 0)
        for query in self.splits.train:
            for key in query.relevant:
                if key in counts:
                    counts[key] += 1
        return sorted(keys, key=lambda key: -counts[key])

    def described(self, example: Query) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        return example.line, self._judgements.shown(example.relevant), example.text

    # ------------------------------------------------------------ export

    @staticmethod
    def save_extras(recipe: Any, folder: Path) -> None:
        """See `Task`: also how vectors are made, in the form of sentence-transformers, which can load the folder."""
        ExampleTask.save_extras(recipe, folder)
        config = json.loads((folder / "config.json").read_bytes())
        (folder / POOLING).parent.mkdir()
        pooling = {
            "word_embedding_dimension": config["hidden_size"],
            "pooling_mode_cls_token": recipe.pooling == "cls",
            "pooling_mode_mean_tokens": recipe.pooling == "mean",
        }
        (folder / POOLING).write_text(json.dumps(pooling, indent=1) + "\n")
        kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")

    @staticmethod
    def logits_of(outputs: Any) -> Tensor:
        """See `Task`: hidden states (rows, tokens, hidden_size), of which pooling makes the vectors."""
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one padded batch; each gives (tokens, hidden_size)."""
        rows = [document.numpy().astype(np.int32) for document in documents]
        hidden = model(**padded(rows, model.config.pad_token_id, max(map(len, rows)))).last_hidden_state
        return [hidden[number, : len(row)] for number, row in enumerate(rows)]


class _Layout:
    """Where the texts of a global batch lie: all queries by row, then the documents of each row in turn."""

    def __init__(self, first_row: int, rows: Sequence[Row]) -> None:
        self._first_row = first_row
        sizes = [len(row.target) - 1 for row in rows]
        self._ends: NDArray[np.int64] = np.cumsum(sizes)
        self.first_documents: NDArray[np.int64] = self._ends - np.array(sizes)  # (rows,) among the documents
        self.documents = np.concatenate([row.target[1:] for row in rows])  # their numbers
        self.texts = len(rows) + len(self.documents)
        self._rows = len(rows)

    def places(self, batch: StepBatch) -> list[tuple[Tensor, Tensor]]:
        """Of each micro-batch its rows of the global batch, and the places of its texts, queries first.

        A micro-batch that counts for nothing has the first row of its rank.
        """
        found = []
        for micro_batch in batch.micro_batches:
            numbers = micro_batch.row_numbers if len(micro_batch.row_numbers) else batch.row_numbers[:1]
            own = numbers - self._first_row
            documents = [np.arange(self.first_documents[row], self._ends[row]) + self._rows for row in own]
            found.append((torch.from_numpy(own), torch.from_numpy(np.concatenate([own, *documents]))))
        return found
