"""A recipe meets a run folder: the folder is new, or holds a run of it that can be resumed, or is refused.

    python -m dstrain.rundir.prepare RECIPE --run-dir DIR [key=value …]

makes DIR ready for one more attempt and prints that attempt's number; the plain scripts in launch/ use it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dstrain.base.storage import StoragePath
from dstrain.checkpoint.data_change import DATA_CHANGE, changes, permit
from dstrain.checkpoint.identity import Identity, stream_identity
from dstrain.checkpoint.manifest import checkpoints_of, newest_manifest
from dstrain.checkpoint.store_owner import claim
from dstrain.data.shards import Corpus
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from dstrain.plan.timeline import make_timeline
from dstrain.recipe.difference import Difference
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.show import resolved_yaml, resume_differences
from dstrain.rundir.run_folder import newest_checkpoint_step, next_attempt


def check_recipe(run_dir: Path, recipe: Recipe, allow: str | None = None) -> None:
    """Whether the folder is free for this recipe, or holds a run of it that can be resumed.

    A folder in which no step was trained yet is free, so that a recipe can be corrected after a failed start.

    Paths do not count, but what lies there: shards and tokenizer are opened, and compared with the newest checkpoint.

    Args:
        run_dir: the run's folder.
        recipe: to go on with.
        allow: DATA_CHANGE: what decides the rows may differ.

    Raises:
        UserError: what the run was trained on differs; names each key, before and after.
    """
    file, ledger = run_dir / "recipe.yaml", run_dir / "ledger.jsonl"
    trained = newest_checkpoint_step(run_dir) is not None or (ledger.exists() and ledger.stat().st_size > 0)
    if not (file.exists() and trained):
        return
    differences = resume_differences(load_recipe(file, check_files=False).recipe, recipe)
    differences += data_differences(run_dir, recipe)
    allowable = [difference for difference in differences if difference.is_of_data]
    refused = [difference for difference in differences if allow != DATA_CHANGE or not difference.is_of_data]
    if refused:
        other_way = f"; or --allow {DATA_CHANGE} to go on with other data" if refused == allowable else ""
        raise UserError(
            f"{run_dir} holds a run of another recipe, or of other data; what it was trained on must not change:\n"
            + "\n".join(f"  {difference}" for difference in refused)
            + f"\ngive another --run-dir to start a new run, or what there was to resume this one{other_way}"
        )


def data_differences(run_dir: Path, recipe: Recipe) -> list[Difference]:
    """In what shards and tokenizer differ from what the newest checkpoint was trained on; empty without a checkpoint.

    Tasks on examples compare theirs when their ranks have read them.

    Raises:
        OtherFormatError: the checkpoint is of another law of the data.
        CorpusError: the shards cannot be read.
    """
    manifest = newest_manifest(run_dir)
    if manifest is None or not isinstance(recipe, PretrainingRecipe) or manifest.identity.get("task") != recipe.task:
        return []
    identity = identity_of(recipe)
    base = {"base": manifest.identity["base"]} if "base" in manifest.identity else {}  # known once the model is built
    return changes(manifest, identity | base)


def identity_of(recipe: PretrainingRecipe) -> Identity:
    """What fixes the rows of a recipe, from the contents of its shards and its tokenizer.

    Raises:
        CorpusError: they cannot be used as they are.
        RecipeError: the recipe's phases do not fit them.
    """
    tokenizer = load_document_tokenizer(recipe.tokenizer)
    corpora = open_sources(recipe, tokenizer)
    timeline = make_timeline(recipe, {name: corpus.total_tokens for name, corpus in corpora.items()})
    assert timeline is not None, "all sizes are known"
    return stream_identity(recipe, timeline, corpora, tokenizer.digest)


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
    if isinstance(recipe, PretrainingRecipe):
        tokenizer = load_document_tokenizer(recipe.tokenizer)
        sources = recipe.data.training_sources.values()
        valid = [recipe.data.valid, *(source.valid for source in sources)]
        for location in dict.fromkeys(filter(None, (*(source.shards for source in sources), *valid))):
            _open(location, recipe, tokenizer)


def open_sources(recipe: PretrainingRecipe, tokenizer: DocumentTokenizer) -> dict[str, Corpus]:
    """The corpora that a recipe trains on, by their names. Raises CorpusError."""
    return {name: _open(source.shards, recipe, tokenizer) for name, source in recipe.data.training_sources.items()}


def _open(location: str, recipe: PretrainingRecipe, tokenizer: DocumentTokenizer) -> Corpus:
    """Open a corpus, and have a look at its shards: ranks would notice a truncated one where they first read it."""
    data = recipe.data
    corpus = Corpus.open(
        location,
        text_field=data.text_field,
        tokenizer=tokenizer,
        on_bad_sample=data.on_bad_sample,
        max_bad_samples=data.max_bad_samples,
    )
    corpus.check_sizes()
    return corpus


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m dstrain.rundir.prepare", description="prepare a run's folder")
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
        if isinstance(store, StoragePath):
            claim(store, arguments.run_dir)  # nobody takes it off: the scripts become torchrun
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(next_attempt(arguments.run_dir))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
