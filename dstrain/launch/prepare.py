"""A recipe meets a run folder: the folder is new, or holds a run of it that can be resumed, or is refused.

    python -m dstrain.launch.prepare RECIPE --run-dir DIR [key=value …]

makes DIR ready for one more attempt and prints that attempt's number; the plain scripts in launch/ use it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dstrain.checkpoint.data_change import DATA_CHANGE, permit
from dstrain.checkpoint.manifest import checkpoints_of
from dstrain.checkpoint.store import StorePath
from dstrain.checkpoint.store_owner import claim
from dstrain.data.shards import Corpus
from dstrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from dstrain.launch.run_folder import newest_checkpoint_step, next_attempt
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.recipe.show import resolved_yaml, resume_differences

_DATA_KEYS = ("data.", "tokenizer:", "train.global_batch_rows:")


def check_recipe(run_dir: Path, recipe: Recipe, allow: str | None = None) -> None:
    """Whether the folder is free for this recipe, or holds a run of it that can be resumed.

    A folder in which no step was trained yet is free, so that a recipe can be corrected after a failed start.

    Args:
        run_dir: the run's folder.
        recipe: to go on with.
        allow: DATA_CHANGE: what decides the rows may differ.

    Raises:
        UserError: it belongs to a recipe that differs in what must not change on resume; names each key.
    """
    file, ledger = run_dir / "recipe.yaml", run_dir / "ledger.jsonl"
    trained = newest_checkpoint_step(run_dir) is not None or (ledger.exists() and ledger.stat().st_size > 0)
    if not (file.exists() and trained):
        return
    differences = resume_differences(load_recipe(file, check_files=False).recipe, recipe)
    of_data = [difference for difference in differences if difference.startswith(_DATA_KEYS)]
    if differences and not (allow == DATA_CHANGE and of_data == differences):
        other_way = f"; or --allow {DATA_CHANGE} to go on with other data" if of_data == differences else ""
        refused = [difference for difference in differences if allow is None or difference not in of_data]
        raise UserError(
            f"{run_dir} holds a run of another recipe; these keys must not change on resume:\n"
            + "\n".join(f"  {difference}" for difference in refused)
            + f"\ngive another --run-dir to start a new run, or the old values to resume this one{other_way}"
        )


def write_recipe(run_dir: Path, recipe: Recipe, allow: str | None = None) -> None:
    """Put the resolved recipe, which the ranks read, into the folder as a whole or not at all; and what is allowed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if allow == DATA_CHANGE:
        permit(run_dir)
    temporary = run_dir / f".recipe.yaml.{os.getpid()}"
    temporary.write_text(resolved_yaml(recipe))
    temporary.replace(run_dir / "recipe.yaml")


def open_corpus(recipe: Recipe) -> None:
    """Open the shards once, before the ranks do: those without an index get theirs here, not from every rank at once.

    Raises:
        CorpusError: they cannot be used as they are.
    """
    if isinstance(recipe, MaskedLmRecipe):
        for location in filter(None, (recipe.data.train, recipe.data.valid)):
            Corpus.open(location, text_field=recipe.data.text_field)


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m dstrain.launch.prepare", description="prepare a run's folder")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--allow", choices=[DATA_CHANGE], help="go on with other data than before")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides).recipe
        check_recipe(arguments.run_dir, recipe, arguments.allow)
        open_corpus(recipe)
        write_recipe(arguments.run_dir, recipe, arguments.allow)
        store = checkpoints_of(arguments.run_dir)
        if isinstance(store, StorePath):
            claim(store, arguments.run_dir)  # nobody takes it off: the scripts become torchrun
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(next_attempt(arguments.run_dir))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
