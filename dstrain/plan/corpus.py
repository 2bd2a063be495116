"""How large a recipe's corpora are, as far as their indexes say it."""

from dataclasses import dataclass
from pathlib import Path

from dstrain.errors import CorpusError
from dstrain.recipe.schema import MaskedLmRecipe, Recipe


@dataclass(frozen=True)
class CorpusSize:
    """Tokens and documents of one epoch."""

    tokens: int
    documents: int


def corpus_sizes(recipe: Recipe) -> dict[str, CorpusSize]:
    """Return the sizes of a pretraining recipe's sources, those whose tokens somebody has counted, by name."""
    if not isinstance(recipe, MaskedLmRecipe):
        return {}
    sizes = {name: _indexed_size(source.shards) for name, source in recipe.data.training_sources.items()}
    return {name: size for name, size in sizes.items() if size is not None}


def corpus_tokens(recipe: Recipe) -> dict[str, int] | int | None:
    """Return the number of tokens of one epoch as `make_timeline` takes it.

    A number, or None where it is not known; of a recipe with `data.sources` those that are known, by name.
    """
    tokens = {name: size.tokens for name, size in corpus_sizes(recipe).items()}
    if isinstance(recipe, MaskedLmRecipe) and recipe.data.sources is not None:
        return tokens
    return next(iter(tokens.values()), None)


def _indexed_size(shards: str) -> CorpusSize | None:
    """The size that the index of a folder says, or None where there is no index, or one without tokens."""
    from dstrain.data.index import read_corpus_index  # imports numpy, which no rule of a recipe needs

    location = Path(shards)
    try:
        index = read_corpus_index(location if location.is_dir() else location.parent)
    except (OSError, CorpusError):
        return None
    if index is None or not index.tokenizer:
        return None
    return CorpusSize(int(index.shards.tokens.sum()), int(index.shards.documents.sum()))
