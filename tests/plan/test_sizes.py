"""What indexes tell a plan about the size of a corpus."""

from collections.abc import Callable
from pathlib import Path

from planned import masked_lm

from dstrain.cli import parse
from dstrain.data.commands import index_command
from dstrain.data.shards import Corpus
from dstrain.data.tokens import load_document_tokenizer
from dstrain.data.writer import write_text_shards
from dstrain.plan.corpus import CorpusSize, corpus_sizes, corpus_tokens
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
