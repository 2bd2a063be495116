"""What indexes tell a plan about the size of a corpus."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from planned import masked_lm

from dstrain.cli import parse
from dstrain.data.commands import index_command
from dstrain.data.lanes import SourceLanes
from dstrain.data.shards import Corpus
from dstrain.data.tokens import load_document_tokenizer
from dstrain.data.writer import write_text_shards
from dstrain.plan.as_json import plan_json
from dstrain.plan.corpus import CorpusSize, corpus_sizes, corpus_tokens
from dstrain.plan.overview import make_plan
from dstrain.plan.streams import training_stream
from dstrain.plan.text import plan_text
from dstrain.plan.timeline import make_timeline
from dstrain.recipe.schema import MaskedLmRecipe, Recipe


def recipe_of(tokenizer: Path, **data: object) -> MaskedLmRecipe:
    return masked_lm(data=data).model_copy(update={"tokenizer": str(tokenizer)})


def test_token_shards_say_how_large_they_are(tiny_recipe: Callable[..., Recipe], tiny_corpus: Path) -> None:
    corpus = Corpus.open(str(tiny_corpus / "train"))
    assert corpus_sizes(tiny_recipe()) == {"train": CorpusSize(corpus.total_tokens, 250)}
    assert corpus_tokens(tiny_recipe()) == corpus.total_tokens
    first = Corpus.open(str(tiny_corpus / "train" / "*0.tar"))
    assert corpus_tokens(tiny_recipe(f"data.train={tiny_corpus}/train/*0.tar")) == first.total_tokens
    assert first.total_tokens < corpus.total_tokens


def test_no_more_documents_are_cut_than_a_plan_says(tiny_recipe: Callable[..., Recipe], tiny_corpus: Path) -> None:
    recipe = tiny_recipe("data.lanes=4")
    assert isinstance(recipe, MaskedLmRecipe)
    plan = make_plan(recipe, 1, corpus_sizes(recipe))
    source = plan_json(plan)["sources"]["train"]
    timeline = make_timeline(recipe, source["tokens"])
    assert timeline is not None
    lanes = SourceLanes(Corpus.open(str(tiny_corpus / "train")), training_stream(recipe, timeline))
    assert lanes.line.blocks == source["blocks"]
    corpus = lanes.corpus
    places = [(shard, document) for shard, count in enumerate(corpus.document_counts) for document in range(count)]
    ends = np.cumsum([len(corpus.shard(shard).read_document(document)) for shard, document in places]).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    for epoch in range(6):
        pieces = [len(list(lanes.line.windows_of(first, last, epoch))) for first, last in spans]
        assert 0 < sum(count > 1 for count in pieces) <= source["most_documents_cut"] == source["blocks"] + 2
    share = f"{100 * source['most_documents_cut'] / 250:.2g} %"
    assert f"at most {share} of its documents are cut by a border of a block or lane" in plan_text(plan)


def test_the_tokens_of_texts_are_known_once_they_were_counted(
    tmp_path: Path, tiny_texts: list[str], tiny_tokenizer: Path
) -> None:
    write_text_shards(tmp_path / "texts", tiny_texts[:50])
    recipe = recipe_of(tiny_tokenizer, train=str(tmp_path / "texts"))
    assert corpus_tokens(recipe) is None
    index_command(parse(["shards", "index", str(tmp_path / "texts"), "--tokenizer", str(tiny_tokenizer)]))
    encode = load_document_tokenizer(tiny_tokenizer).encode
    assert corpus_tokens(recipe) == sum(len(encode(text)) for text in tiny_texts[:50])


def test_sources_are_known_by_name_or_not_at_all(tmp_path: Path, tiny_corpus: Path, tiny_tokenizer: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "index.json").write_text("{")
    locations = {"known": tiny_corpus / "valid", "absent": tmp_path / "absent", "damaged": damaged}
    sources = {name: {"shards": str(path)} for name, path in locations.items()}
    tokens = corpus_tokens(recipe_of(tiny_tokenizer, train=None, sources=sources))
    assert tokens == {"known": Corpus.open(str(tiny_corpus / "valid")).total_tokens}
