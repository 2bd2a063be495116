"""`dstrain index`, `dstrain search` and `dstrain mine`: from a bi-encoder to answers, and to harder examples."""

import json
from argparse import Namespace
from pathlib import Path

from dstrain.base.durable import write_durably
from dstrain.errors import EXIT_DONE, UserError
from dstrain.predict.command import predict_file
from dstrain.predict.loaded import transformers_folder
from dstrain.predict.search import Index, Searcher, embedder_of
from dstrain.recipe.data import RetrievalData
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import RankingRecipe, RetrievalRecipe
from dstrain.tasks.queries import Query, read_queries, read_texts

CANDIDATES = "candidates"
BATCH_ROWS = 64


def index_command(args: Namespace) -> int:
    """`dstrain index MODEL CORPUS --out DIR [--id-field id] [--text-field text] [--title-field KEY] [--faiss KIND]`."""
    data = RetrievalData(
        train="-",
        sequence_length=1,
        id_field=args.id_field,
        text_field=args.text_field,
    )
    _require_positive(args.batch_rows, "--batch-rows", "row")
    documents = read_texts(data, args.corpus, "CORPUS", args.title_field)
    out = Path(args.out)
    Index.build(transformers_folder(Path(args.model)), documents, out, args.faiss, args.batch_rows)
    print(f"{out}: {len(documents):,} documents of {args.corpus}")
    return EXIT_DONE


def search_command(args: Namespace) -> int:
    """`dstrain search INDEX FILE|- [--top N] [--rerank MODEL] [--text-field KEY]`."""
    _require_positive(args.top, "--top", "document")
    rerank = None if args.rerank is None else transformers_folder(Path(args.rerank))
    return predict_file(Searcher.open(Path(args.index), rerank, args.top), args.file, args.text_field, args.batch_rows)


def mine_command(args: Namespace) -> int:
    """`dstrain mine RECIPE [key=value …] --index INDEX --out FILE [--split train] [--top N]`."""
    _require_positive(args.top, "--top", "candidate")
    _require_positive(args.batch_rows, "--batch-rows", "row")
    recipe = load_recipe(Path(args.recipe), args.overrides).recipe
    if not isinstance(recipe, RetrievalRecipe | RankingRecipe):
        raise UserError(f"{args.recipe} is a recipe of task {recipe.task}; give one of retrieval or ranking")
    judgements, _ = read_queries(recipe.data)
    queries = judgements.splits.named().get(args.split)
    if queries is None:
        raise UserError(f"--split {args.split}: {args.recipe} has no data.{args.split}")
    index = Index.open(Path(args.index))
    key_of = {key if judgements.corpus else text: key for key, text in judgements.documents.items()}
    keys = [key_of.get(each) for each in (index.ids if judgements.corpus else index.texts)]
    if not any(keys):
        raise UserError(f"{args.index} has no document of the recipe; make it of data.corpus={recipe.data.corpus}")
    vectors = embedder_of(index.model).vectors([query.text for query in queries], args.batch_rows)
    places, _ = index.nearest(vectors, args.top + max(len(query.excluded) for query in queries))
    lines = []
    for query, own in zip(queries, places.tolist(), strict=True):
        excluded = frozenset(query.excluded)
        found = [key for place in own if place >= 0 and (key := keys[place]) and key not in excluded]
        records = mined_records(recipe.data, query, found[: args.top])
        lines += [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    try:
        write_durably(Path(args.out), "".join(lines))
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror or error}") from error
    print(f"{args.out}: the {args.top} nearest documents of {len(queries):,} queries of data.{args.split}; train with")
    print(f"data.{args.split}={args.out} data.candidates_field={CANDIDATES}")
    return EXIT_DONE


def _require_positive(value: int, option: str, what: str) -> None:
    if value < 1:
        raise UserError(f"{option} {value}: give 1 {what} at least")


def mined_records(data: RetrievalData, query: Query, candidates: list[str]) -> list[dict[str, object]]:
    """A query's records again, one for each score of its documents, with the candidates beside them."""
    records = []
    for score in dict.fromkeys(query.relevance.values()):
        judged = [key for key, value in query.relevance.items() if value == score]
        record: dict[str, object] = {data.query_field: query.id, data.positive_field: judged}
        record |= {data.score_field: score} if data.score_field is not None else {}
        record |= {data.exclude_field: list(query.excluded)} if data.exclude_field is not None else {}
        records.append(record | {CANDIDATES: candidates})
    return records
