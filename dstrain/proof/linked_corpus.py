"""A stand-in for corpora: links to their shards, of which one can be replaced by a damaged copy."""

import shutil
from pathlib import Path

import numpy as np

from dstrain.checkpoint.manifest import Manifest
from dstrain.data.index import DIGEST_BLOCK_BYTES
from dstrain.data.locate import locate
from dstrain.proof.training_data import TrainingData
from dstrain.recipe.schema import PretrainingRecipe


def on_linked_corpora(recipe: PretrainingRecipe, folder: Path) -> PretrainingRecipe:
    """The recipe on links to its shards, which lie in a new folder; a sample that cannot be read stops it."""
    locations = {}
    for name, source in recipe.data.training_sources.items():
        link_corpus(source.shards, folder / name)
        locations[name] = str((folder / name).resolve())
    changes: dict[str, object] = {"on_bad_sample": "stop"}
    if recipe.data.sources is None:
        (changes["train"],) = locations.values()
    else:
        changes["sources"] = {
            name: source.model_copy(update={"shards": locations[name]}) for name, source in recipe.data.sources.items()
        }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def link_corpus(location: str, folder: Path) -> None:
    """Link every shard of a location into a new folder, with what is known of them."""
    located = locate(location)
    folder.mkdir(parents=True)
    shards = [located.path(number) for number in range(len(located))]
    files = [file for shard in shards for file in shard.parent.glob(f"{shard.name}*")]
    if Path(location).is_dir():  # all of it: what is known of the folder holds of the links too
        files += Path(location).glob("*.json")
    for file in dict.fromkeys(files):
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())


def next_shard(recipe: PretrainingRecipe, checkpoint: Path) -> Path:
    """The shard that lane 0 reads next after a checkpoint."""
    manifest = Manifest.read(checkpoint)
    data = TrainingData.open(recipe, manifest.data_origin)
    places = data.layout.places(manifest.data_step, np.zeros(1, np.int64))
    lanes = data.lanes[int(places.sources[0, 0])]
    slices = lanes.slices(0, int(places.positions[0, 0]), 1)
    return lanes.corpus.shard_path(int(slices.shard[0]))


def damage(shard: Path) -> None:
    """Replace a linked shard by a copy in which one bit of every block that has a digest is another one."""
    original = shard.resolve()
    shard.unlink()
    shutil.copyfile(original, shard)
    with shard.open("r+b") as file:
        size = original.stat().st_size
        for place in range(0, size, DIGEST_BLOCK_BYTES):
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1]))


def repair(shard: Path, original: Path) -> None:
    """Put the link back."""
    shard.unlink()
    shard.symlink_to(original)
