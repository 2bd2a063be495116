"""An index of documents as vectors, and the search in it.

INDEX/index.json        the model's folder, how many documents of how many dimensions, the kind of FAISS index
INDEX/documents.jsonl   {"id": …, "text": …}, a line for each row of
INDEX/vectors.npy       fp32 (documents, hidden_size), unit vectors
INDEX/vectors.faiss     the same for FAISS, where it was asked for; it is searched instead
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from dstrain.base.extras import require
from dstrain.errors import UserError
from dstrain.predict.predictors import model_predictor
from dstrain.predict.rankers import DECIMALS, PairScorer, TextEmbedder

INDEX = "index.json"
DOCUMENTS, VECTORS, FAISS = "documents.jsonl", "vectors.npy", "vectors.faiss"
QUERIES_AT_ONCE, DOCUMENTS_AT_ONCE = 256, 65_536  # whose similarities are in memory
TOP = 10
RERANKED = 50  # documents that a cross-encoder looks at


@dataclass(frozen=True)
class Index:
    """Documents and their vectors, found again by the vectors of queries."""

    model: Path
    ids: Sequence[str]
    texts: Sequence[str]
    vectors: NDArray[np.float32]  # on the disk, mapped
    faiss: Any = None

    @staticmethod
    def build(model: Path, documents: dict[str, str], out: Path, kind: str | None, batch_rows: int) -> None:
        """Write an index.

        Args:
            model: folder of a bi-encoder.
            documents: texts by id.
            out: where to; it must not exist or be empty.
            kind: of a FAISS index as its `index_factory` has it (Flat, HNSW32, "IVF256,Flat"); None for none.
            batch_rows: most texts that share a batch.

        Raises:
            UserError: `out` is taken, the model makes no vectors, FAISS is not installed, or knows no such kind.
        """
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder; remove it, or give another --out")
        library = _faiss() if kind is not None else None
        embedder = embedder_of(model)
        staging = out.with_name(f".staging-{out.name}")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            vectors = _embedded(embedder, list(documents.values()), staging / VECTORS, batch_rows)
            with (staging / DOCUMENTS).open("w", encoding="utf-8") as file:
                for name, text in documents.items():
                    file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            if library is not None:
                library.write_index(_trained(library, vectors, kind or ""), str(staging / FAISS))
            about = {"model": str(model.absolute()), "documents": len(documents), "dimensions": vectors.shape[1]}
            (staging / INDEX).write_text(json.dumps(about | {"faiss": kind}, indent=1) + "\n")
            staging.replace(out)
        except OSError as error:
            raise UserError(f"{out}: no index: {error}; make room there, or give another --out") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Open what `build` wrote. Raises UserError where it is not there, damaged, or needs a FAISS that is not."""
        try:
            about = json.loads((folder / INDEX).read_bytes())
            content = (folder / DOCUMENTS).read_text(encoding="utf-8")
            lines = [json.loads(line) for line in content.split("\n") if line]  # texts may hold other line ends
            vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            model, kind, shape = Path(about["model"]), about["faiss"], (about["documents"], about["dimensions"])
            ids, texts = [line["id"] for line in lines], [line["text"] for line in lines]
        except FileNotFoundError as error:
            raise UserError(f"{folder} is no index ({error.filename} is missing); make one: dstrain index") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: damaged index ({error}); make it again: dstrain index") from error
        if vectors.shape != shape or len(ids) != shape[0]:
            raise UserError(f"{folder}: damaged index (its files differ in length); make it again: dstrain index")
        return cls(model, ids, texts, vectors, None if kind is None else _faiss().read_index(str(folder / FAISS)))

    def nearest(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places of the nearest documents, the best first, and their cosines, both (queries, top or all there are)."""
        top = min(top, len(self.ids))
        if self.faiss is not None:
            scores, places = self.faiss.search(queries, top)
            return places, scores
        parts = [queries[start : start + QUERIES_AT_ONCE] for start in range(0, len(queries), QUERIES_AT_ONCE)]
        found = [self._exact(part, top) for part in parts]
        return np.concatenate([places for places, _ in found]), np.concatenate([scores for _, scores in found])

    def _exact(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The same of a few queries, by looking at every document."""
        best_places = np.empty((len(queries), 0), np.int64)
        best = np.empty((len(queries), 0), np.float32)
        for start in range(0, len(self.ids), DOCUMENTS_AT_ONCE):
            part = queries @ self.vectors[start : start + DOCUMENTS_AT_ONCE].T
            best = np.concatenate([best, part], axis=1)
            here = np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)
            best_places = np.concatenate([best_places, here], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :top]
            best, best_places = np.take_along_axis(best, order, 1), np.take_along_axis(best_places, order, 1)
        return best_places, best


class Searcher:
    """The documents that answer a query: those nearest to it, put in order by a cross-encoder where there is one."""

    fields: tuple[str, ...] = ("query",)
    tokens_field: str | None = None

    def __init__(self, index: Index, embedder: TextEmbedder, scorer: PairScorer | None, top: int) -> None:
        self._index, self._embedder, self._scorer, self._top = index, embedder, scorer, top

    @classmethod
    def open(cls, folder: Path, rerank: Path | None = None, top: int = TOP) -> "Searcher":
        """The search of an index.

        Args:
            folder: of the index.
            rerank: folder of a cross-encoder, which puts the nearest documents in order.
            top: how many documents are wanted.

        Raises:
            UserError: index or models cannot be used.
        """
        index = Index.open(folder)
        scorer = None if rerank is None else model_predictor(rerank)
        if scorer is not None and not isinstance(scorer, PairScorer):
            raise UserError(f"--rerank {rerank} is no cross-encoder; give the export of a run of task ranking")
        return cls(index, embedder_of(index.model), scorer, top)

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        """See `Predictor`: `results`, each with `id`, `score` and `text`, the best first."""
        queries = [query for (query,) in values]
        wanted = self._top if self._scorer is None else max(self._top, RERANKED)
        places, scores = self._index.nearest(self._embedder.vectors(queries, batch_rows), wanted)
        found = [
            [(float(score), int(place)) for place, score in zip(*pair, strict=True) if place >= 0]
            for pair in zip(places, scores, strict=True)
        ]
        if self._scorer is not None:
            pairs = [
                (query, self._index.texts[place]) for query, own in zip(queries, found, strict=True) for _, place in own
            ]
            better = iter(self._scorer.scores(pairs, batch_rows))
            found = [sorted(((next(better), place) for _, place in own), key=lambda one: -one[0]) for own in found]
        return [{"results": [self._result(score, place) for score, place in own[: self._top]]} for own in found]

    def _result(self, score: float, place: int) -> dict[str, Any]:
        return {"id": self._index.ids[place], "score": round(score, DECIMALS), "text": self._index.texts[place]}


def embedder_of(model: Path) -> TextEmbedder:
    """The bi-encoder of a folder. Raises UserError where it holds another model."""
    found = model_predictor(model)
    if not isinstance(found, TextEmbedder):
        raise UserError(f"{model} makes no vectors of texts; give the export of a run of task retrieval")
    return found


def _embedded(embedder: TextEmbedder, texts: Sequence[str], file: Path, batch_rows: int) -> NDArray[np.float32]:
    """The vectors of texts, written as they are made."""
    step = batch_rows * 64  # within which texts are sorted by length
    vectors: NDArray[np.float32] | None = None
    for start in range(0, len(texts), step):
        part = embedder.vectors(texts[start : start + step], batch_rows)
        if vectors is None:
            vectors = open_memmap(file, mode="w+", dtype=np.float32, shape=(len(texts), part.shape[1]))
        vectors[start : start + len(part)] = part
    assert vectors is not None, "there is a text"
    vectors.flush()  # type: ignore[attr-defined]
    return vectors


def _faiss() -> Any:
    require("faiss", "this index")
    import faiss

    return faiss


def _trained(library: Any, vectors: NDArray[np.float32], kind: str) -> Any:
    try:
        index = library.index_factory(vectors.shape[1], kind, library.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(np.asarray(vectors))
        index.add(np.asarray(vectors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1] if str(error) else error
        raise UserError(f"--faiss {kind}: FAISS cannot make it of {len(vectors):,} documents: {reason}") from error
    return index
