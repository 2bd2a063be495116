"""How large a recipe's corpora are, as far as their indexes say it."""

from dataclasses import dataclass

from dstrain.errors import CorpusError
from dstrain.recipe.schema import PretrainingRecipe, Recipe


@dataclass(frozen=True)
class CorpusSize:
    """Tokens and documents of one epoch."""

    tokens: int
    documents: int


def corpus_sizes(recipe: Recipe) -> dict[str, CorpusSize]:
    """Return the sizes of a pretraining recipe's sources, those whose tokens somebody has counted, by name."""
    if not isinstance(recipe, PretrainingRecipe):
        return {}
    sizes = {name: _known_size(source.shards, recipe) for name, source in recipe.data.training_sources.items()}
    return {name: size for name, size in sizes.items() if size is not None}


def corpus_tokens(recipe: Recipe) -> dict[str, int] | int | None:
    """Return the number of tokens of one epoch, or None where it is not known; with `data.sources`, by name."""
    tokens = {name: size.tokens for name, size in corpus_sizes(recipe).items()}
    if isinstance(recipe, PretrainingRecipe) and recipe.data.sources is not None:
        return tokens
    return next(iter(tokens.values()), None)


def _known_size(shards: str, recipe: PretrainingRecipe) -> CorpusSize | None:
    """The size of indexed shards; None where there is no index, or where nobody has counted the tokens of texts."""
    from dstrain.data.index import TYPES  # import numpy, which no rule of a recipe needs
    from dstrain.data.locate import locate_indexed

    try:
        located = locate_indexed(shards)
        if located is None:
            return None
        table = located.table
        tokens = int(table.tokens.sum())
        if TYPES[int(table.types[0])] is None:
            from dstrain.data.counts import TokenCounter
            from dstrain.data.tokens import load_document_tokenizer

            counter = TokenCounter(load_document_tokenizer(recipe.tokenizer), recipe.data.text_field)
            counted = counter.known_tokens(located)
            if counted is None:
                return None
            tokens = counted
    except (OSError, CorpusError):
        return None
    return CorpusSize(tokens, int(table.documents.sum()))
