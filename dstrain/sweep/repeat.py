"""`dstrain sweep RECIPE --seeds N`: the recipe as it is, N times with seeds of its own, and once for each fold.

A sweep whose grid has nothing but chance in it: its trials differ in seeds and in what is held out. Their scores are
given with mean and deviation, and what the folds said of the examples that each held out is put together.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.errors import UserError
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.sweep import SearchedKey, Sweep
from dstrain.report.page import read_predictions, write_report

SEEDS, FOLD = "train.seed, data.seed", "data.fold"
OUT_OF_FOLD = "out-of-fold{}.jsonl"


def repeats(recipe: Recipe, seeds: int) -> Sweep:
    """The sweep over `seeds` seeds, the recipe's train.seed and those after it, and all folds.

    Raises:
        UserError: that is a single run.
    """
    folds = None if isinstance(recipe, PretrainingRecipe) else recipe.data.folds
    first = recipe.train.seed
    parameters = {}
    if seeds > 1:
        parameters[SEEDS] = SearchedKey(choices=tuple(range(first, first + seeds)))
    if folds is not None:
        parameters[FOLD] = SearchedKey(choices=tuple(range(folds)))
    if not parameters or seeds < 1:
        raise UserError(
            f"--seeds {seeds} of a recipe without data.folds is one run; give --seeds 3, or `dstrain run` it"
        )
    rule = recipe.early_stopping
    return Sweep(
        metric="loss" if rule is None else rule.metric,
        direction="minimize" if rule is None else rule.direction,
        trials=seeds * (folds or 1),
        sampler="grid",
        pruner="none",
        parameters=parameters,
    )


def fixed_split(recipe: Recipe) -> list[str]:
    """The override that keeps what is held out the same whatever the seed."""
    if isinstance(recipe, PretrainingRecipe) or recipe.data.split_seed is not None or recipe.data.valid is not None:
        return []
    return [f"data.split_seed={recipe.data.seed}"]


def report_repeats(folder: Path, runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> dict[str, Path]:
    """Write report.html and report.md of the runs into a folder, and what they said of examples that they held out.

    Args:
        folder: of the sweep.
        runs: folders of runs that are done, each with the values of its trial.

    Returns:
        The files by what is in them.
    """
    pooled: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run, values in runs:
        if FOLD in values:
            seed = f"-seed-{values[SEEDS]}" if SEEDS in values else ""
            pooled[OUT_OF_FOLD.format(seed)] += [
                {"fold": values[FOLD], **judged} for judged in read_predictions(run, "valid")
            ]
    files = {"report": folder / "report.html"}
    for name, judged in pooled.items():
        judged.sort(key=lambda each: each["line"])
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in judged)
        (folder / name).write_text(text, encoding="utf-8")
        files[name.removesuffix(".jsonl")] = folder / name
    named = {name.removesuffix(".jsonl").replace("-", " "): judged for name, judged in pooled.items() if judged}
    write_report([run for run, _ in runs], folder / "report.html", folder / "report.md", pooled=named)
    return files
