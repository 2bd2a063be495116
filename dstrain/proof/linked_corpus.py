"""A stand-in for a corpus: links to its shards, of which one can be replaced by a damaged copy."""

import shutil
from pathlib import Path

import numpy as np

from dstrain.checkpoint.manifest import Manifest
from dstrain.data.index import read_shard_index, shard_index_path
from dstrain.data.order import Order
from dstrain.data.shards import Corpus
from dstrain.recipe.schema import MaskedLmRecipe


def link_corpus(location: str, folder: Path) -> None:
    """Link every shard of a location into a new folder, with what is known of them."""
    corpus = Corpus.open(location)
    folder.mkdir(parents=True)
    for number in range(len(corpus.document_counts)):
        shard = corpus.shard_path(number).resolve()
        (folder / shard.name).symlink_to(shard)
        if shard_index_path(shard).exists():
            (folder / shard_index_path(shard).name).symlink_to(shard_index_path(shard))


def next_shard(recipe: MaskedLmRecipe, checkpoint: Path) -> Path:
    """The shard that lane 0 reads next after a checkpoint."""
    corpus, data = Corpus.open(recipe.data.train), recipe.data
    order = Order(corpus.document_counts, data.lanes, data.seed, data.shuffle_window, "train")
    epoch, position, _ = Manifest.read(checkpoint).cursors[0]
    shard, _, _ = next(order.runs(epoch, 0, order.window_of(position)[0]))
    return corpus.shard_path(shard)


def damage(shard: Path) -> None:
    """Replace a linked shard by a copy in which every text, or every token id, is overwritten."""
    original = shard.resolve()
    index = read_shard_index(shard) if shard_index_path(shard).exists() else read_shard_index(original)
    shard.unlink()
    shutil.copyfile(original, shard)
    columns = index.columns
    with shard.open("r+b") as file:
        if index.summary.kind == "tokens":
            item = np.dtype(index.summary.dtype).itemsize
            for first, tokens in zip(columns["ids_offset"], columns["block_tokens"], strict=True):
                file.seek(int(first))
                file.write(b"\xff" * (int(tokens) * item))
        else:
            for kind in ("txt", "json"):
                for offset, size in zip(columns[f"{kind}_offset"], columns[f"{kind}_bytes"], strict=True):
                    if offset >= 0:
                        file.seek(int(offset))
                        file.write(b"\xff" * int(size))


def repair(shard: Path, original: Path) -> None:
    """Put the link back."""
    shard.unlink()
    shard.symlink_to(original)
