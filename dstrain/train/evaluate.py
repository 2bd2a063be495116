"""`dstrain eval`: the evaluation of a run, again, for one of its checkpoints, on one device."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from dstrain.base.storage import Place, place
from dstrain.checkpoint.choose import choose_checkpoint
from dstrain.checkpoint.load import take
from dstrain.checkpoint.manifest import run_of, step_of
from dstrain.errors import EXIT_DONE, UserError
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.train.alone import alone
from dstrain.train.state import restore_state


def eval_command(args: Namespace) -> int:
    """`dstrain eval RUN|CKPT [key=value …] [--step N] [--split valid|test] [--json]`."""
    path = place(args.path)
    checkpoint, remarks = choose_checkpoint(path, args.step)
    for line in remarks:
        print(line, file=sys.stderr)
    run = run_of(checkpoint) if checkpoint == path else path
    if not isinstance(run, Path):
        raise UserError(f"{args.path} is in a store; give the run's folder, which has its recipe")
    recipe = load_recipe(run / "recipe.yaml", args.overrides).recipe
    metrics = evaluated(checkpoint, recipe, args.split)
    if args.json:
        found = {"checkpoint": str(checkpoint), "step": step_of(checkpoint), "split": args.split, "metrics": metrics}
        print(json.dumps(found, ensure_ascii=False))
        return EXIT_DONE
    print(f"{checkpoint}, data.{args.split}: {_where(recipe, args.split)}")
    for name, value in metrics.items():
        if isinstance(value, int | float):
            print(f"  {name:<24} {value:.6g}")
    return EXIT_DONE


def _where(recipe: Recipe, split: str) -> str:
    """What the metrics are of."""
    if location := getattr(recipe.data, split, None):
        return str(location)
    if not isinstance(recipe, PretrainingRecipe):
        return f"held out of {recipe.data.train}"
    sources = recipe.data.training_sources.items()
    return ", ".join(f"{name} {source.valid}" for name, source in sources if source.valid is not None)


def evaluated(checkpoint: Place, recipe: Recipe, split: str) -> dict[str, Any]:
    """Metrics of a checkpoint as `Task.evaluate` has them, or `Task.evaluate_test`.

    Args:
        checkpoint: of a run on any number of ranks, under any ZeRO stage.
        recipe: that of its run; held-out data, evaluation and precision may differ.
        split: "valid" or "test".

    Raises:
        UserError: there is no such data, or the checkpoint is damaged or of other training data.
    """
    metrics: dict[str, Any] = {}
    with alone(recipe) as (runtime, task):
        restore_state(runtime, task, take(runtime, checkpoint))
        runtime.engine.eval()
        with torch.no_grad():
            if split == "test":
                metrics = task.evaluate_test(runtime, runtime.engine)
            elif task.has_valid:
                metrics = task.evaluate(runtime, runtime.engine)
    if not metrics:
        raise UserError(f"{checkpoint}: nothing to evaluate, its recipe has no data.{split}")
    return metrics
