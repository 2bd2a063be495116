"""Ranking: a query and a document read together by one encoder, and a number that says how well they fit.

A row of training is a document that answers its query, with some that do not; or, pointwise, one document that does or
does not. What is ranked are a query's candidates: those that retrieval found, say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dstrain.architectures import ARCHITECTURES
from dstrain.errors import CorpusError
from dstrain.model.encoder import build_model
from dstrain.recipe.schema import RankingRecipe
from dstrain.tasks.batching import Ids, encoded_pairs, padded
from dstrain.tasks.calibration import binned
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.queries import Judgements, Query, read_queries
from dstrain.tasks.rank_scores import judged_ranking, list_losses, mean_scores, ranking_scores
from dstrain.tasks.splits import SplitReader, Splits
from dstrain.tasks.task import Inputs

NOTHING = -1  # a place of a group that holds no pair


@dataclass(frozen=True)
class GroupRow(Row):
    """Pairs of one query, the one to be preferred first, each with where its document begins. `ids` has all of them."""

    pairs: tuple[tuple[Ids, int], ...] = ()


class CrossEncoder(Head):
    """A Transformers classifier of pairs with a single output. `outputs` are those of each pair, fp32 (pairs,)."""

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        """`kind`: of the loss, `group` or `pointwise`."""
        super().__init__(model)
        self._kind = kind

    def forward(self, places: Tensor, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the rows' losses and number of rows that are right, both fp32 scalars.

        Args:
            places: int64 (rows, longest group), which pairs are a row's, its own document first, filled by `NOTHING`.
            labels: fp32 (rows,), whether that document answers the query; only pointwise may it not.
            inputs: `input_ids`, `attention_mask` and `token_type_ids`, int64 (pairs, tokens).
        """
        logits = self.model(**inputs).logits[:, 0].float()  # (pairs,)
        self.outputs = logits.detach()
        groups = logits[places.clamp(min=0)].masked_fill(places == NOTHING, -torch.inf)  # (rows, longest group)
        if self._kind == "pointwise":
            loss = nn.functional.binary_cross_entropy_with_logits(groups[:, 0], labels, reduction="sum")
            return loss, ((groups[:, 0] > 0) == (labels > 0)).sum(dtype=torch.float32)
        first = torch.zeros_like(places[:, 0])
        loss = nn.functional.cross_entropy(groups, first, reduction="sum")
        return loss, (groups.argmax(dim=-1) == first).sum(dtype=torch.float32)


class Ranking(ExampleTask[Query]):
    """The `ranking` task on one rank."""

    auto_model = AutoModelForSequenceClassification
    _recipe: RankingRecipe
    _judgements: Judgements

    def read(self) -> tuple[Splits[Query], SplitReader]:
        """See `ExampleTask`."""
        self._judgements, reader = read_queries(self._recipe.data)
        return self._judgements.splits, reader

    def build(self) -> Head:
        """See `ExampleTask`."""
        recipe, special_ids = self._recipe, self.encoder.special_token_ids
        model = build_model(recipe.model, recipe.train.seed, special_ids, auto=self.auto_model, num_labels=1)
        return CrossEncoder(model, recipe.loss.kind)

    def make_rows(self, split: str, examples: list[Query]) -> list[Row]:
        """See `ExampleTask`: of training as the loss wants them; else a row for each candidate of each query."""
        groups: list[tuple[int, bool, list[str]]] = []  # number of the query, whether it is answered, documents
        for number, query in enumerate(examples):
            if split != "train":
                groups += [(number, query.relevance.get(key, 0) > 0, [key]) for key in candidates_of(query)]
            elif self._recipe.loss.kind == "pointwise":
                drawn = [key for positive in query.relevant for key in self._negatives(query, positive)]
                groups += [(number, score > 0, [key]) for key, score in query.relevance.items()]
                groups += [(number, False, [key]) for key in dict.fromkeys(drawn)]
            else:
                listed = [(key, *self._negatives(query, key)) for key in query.relevant]
                groups += [(number, True, list(keys)) for keys in listed if len(keys) > 1]
        if not groups:
            raise CorpusError(
                f"data.{split}: no query has a document to be told from its own; name some in data.negatives_field or "
                f"data.candidates_field (`dstrain mine` writes them), or use loss.kind=pointwise with data.score_field"
            )
        pairs = [(examples[number].text, self._judgements.documents[key]) for number, _, keys in groups for key in keys]
        separators = ARCHITECTURES[self._recipe.model.architecture].separators
        encoded = iter(encoded_pairs(self.encoder, pairs, self._recipe.data.sequence_length, separators))
        rows: list[Row] = []
        for number, answers, keys in groups:
            own = tuple(next(encoded) for _ in keys)
            ids, target = np.concatenate([ids for ids, _ in own]), np.array([answers], np.float32)
            rows.append(GroupRow(ids, target, number, 1, pairs=own))
        return rows

    def _negatives(self, query: Query, positive: str) -> list[str]:
        return query.drawn_negatives(positive, self._recipe.data.negatives, self._recipe.data.seed)

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """See `ExampleTask`: the pairs of all rows end to end, and where each row's are."""
        groups = [row.pairs for row in rows if isinstance(row, GroupRow)]
        places = np.full((len(groups), max(map(len, groups))), NOTHING, np.int64)
        done = 0
        for row, pairs in enumerate(groups):
            places[row, : len(pairs)] = np.arange(done, done + len(pairs))
            done += len(pairs)
        ids = [one for pairs in groups for one, _ in pairs]
        starts = [start for pairs in groups for _, start in pairs] if self._token_types else []
        inputs = {"places": torch.from_numpy(places), "labels": self.labels_of(rows, 0)}
        inputs |= padded(ids, self.encoder.pad_id, self._recipe.data.sequence_length, starts)
        return {name: tensor.to(self.runtime.device) for name, tensor in inputs.items()}

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """See `ExampleTask`: whether each row's own document answers its query."""
        return torch.from_numpy(np.concatenate([row.target for row in rows]))

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: the score of each candidate."""
        return list(self.module.outputs.cpu().numpy().astype(np.float64)[:, None])

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`. `report` has the scores of the candidates' own order too, as a baseline."""
        queries = self.splits.named()[split]
        of_query: list[list[float]] = [[] for _ in queries]
        for row, answer in zip(self.rows[split], answers, strict=True):
            of_query[row.example].append(float(answer[0]))
        losses: list[float] = []
        judged: list[dict[str, Any]] = []
        given: list[dict[str, float]] = []
        for query, own in zip(queries, of_query, strict=True):
            keys, logits = candidates_of(query), np.array(own)
            ranked = [keys[place] for place in np.argsort(-logits, kind="stable")]
            shown = self._judgements.shown(ranked)
            judged.append({"predicted": shown, **judged_ranking(ranked, query.relevance)})
            given.append(ranking_scores(keys, query.relevance))
            answered = np.array([query.relevance.get(key, 0) > 0 for key in keys])
            if self._recipe.loss.kind == "pointwise":
                losses += np.logaddexp(0, np.where(answered, -logits, logits)).tolist()
                sure = 1 / (1 + np.exp(-np.abs(logits)))  # that a document answers, or does not
                judged[-1]["calibration"] = binned(sure, (logits > 0) == answered)
            elif len(keys):
                losses += list_losses(logits, np.flatnonzero(answered).tolist())
        means = mean_scores([each["scores"] for each in judged])
        order = mean_scores(given)
        report = means | {"pairs": len(answers), "baselines": {"as given": order}}
        baseline = {"as_given_ndcg_10": order["ndcg_10"]}
        return {"loss": float(np.mean(losses or [0.0])), **means, **baseline, "report": report, "judged": judged}

    def described(self, example: Query) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        return example.line, self._judgements.shown(example.relevant), example.text

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one padded batch; each gives (1,)."""
        rows = [document.numpy().astype(np.int32) for document in documents]
        return list(model(**padded(rows, model.config.pad_token_id, max(map(len, rows)))).logits)


def candidates_of(query: Query) -> list[str]:
    """The documents that are put in order for a query: its candidates, or all that its records name."""
    listed = query.candidates or tuple(query.mentioned())
    return [key for key in listed if key not in query.excluded]
