"""The recipe of a checkpoint's run, which lies in the run's folder, or in a store beside the checkpoints."""

import tempfile
from pathlib import Path

from dstrain.base.storage import Place
from dstrain.checkpoint.manifest import run_of
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe


def recipe_of(checkpoint: Place) -> Recipe | None:
    """The resolved recipe; None if there is none beside the checkpoint."""
    return recipe_in(run_of(checkpoint))


def recipe_in(run: Place) -> Recipe | None:
    """The resolved recipe of a run's folder, or of its place in a store."""
    file = run / "recipe.yaml"
    if isinstance(file, Path):
        return load_recipe(file, check_files=False).recipe if file.is_file() else None
    try:
        text = file.read_text()
    except FileNotFoundError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_text(text, encoding="utf-8")
        return load_recipe(copy, check_files=False).recipe
