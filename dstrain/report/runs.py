"""What runs were, how they went and what they reached, from their folders.

Reads recipe.yaml, metrics.jsonl, the checkpoints' names and the attempts' verdicts; imports no torch.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from dstrain.architectures import model_shape
from dstrain.checkpoint.manifest import MANIFEST, Manifest, committed, step_of
from dstrain.diagnose.verdict import VERDICT_FILE, Verdict
from dstrain.diagnose.verdict_text import failed, how_it_failed
from dstrain.errors import UserError
from dstrain.recipe.keys import flat_values
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.recipe.sweep import CHANCE


@dataclass(frozen=True)
class LoggedMetrics:
    """A run's metrics.jsonl without what a resume or a rollback undid, in step order."""

    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


@dataclass(frozen=True)
class RunSummary:
    """What there is to say about a run. Values that the run has not come to are None."""

    run: str
    name: str
    task: str
    model: str
    weights: str
    data: str
    batch: str
    optimizer: str
    numerics: str
    ranks: int | None
    attempts: int
    failures: list[str]
    step: int
    total_steps: int | None
    tokens: int | None
    loss_first: float | None
    loss_last: float | None
    loss_best: float | None
    sources: dict[
        str, dict[str, Any]
    ]  # of a mixture, as metrics.jsonl has them; losses are the last that were measured
    tokens_per_second: float | None
    data_wait_share: float | None
    goodput: float | None  # share of computing in all time since the run began
    newest_checkpoint_step: int | None
    evaluation: dict[str, float]  # of the last evaluation, names without `valid_`
    evaluation_step: int | None
    classification: dict[str, Any] | None  # the report of that evaluation, whatever the task says in it
    test: dict[str, float]  # scores of data.test at the end of the run
    settings: str  # digest of the recipe without its name, and without what `chance` has
    chance: str  # its seeds, and its fold where there are folds


def read_metrics(path: Path) -> LoggedMetrics:
    """Read metrics.jsonl. A step that comes again after a resume undoes what stood there from that step on.

    A last line that a killed run left unfinished is passed over.

    Raises:
        UserError: another line is damaged, naming it.
    """
    kept: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: damaged line; delete it") from error
        if "saved_step" in entry:  # written when a save is over, at whichever step that is
            continue
        if kept and (step < kept[-1]["step"] or (step, entry.keys()) in ((e["step"], e.keys()) for e in kept[-2:])):
            kept = [earlier for earlier in kept if earlier["step"] < step]
        kept.append(entry)
        if "rolled_back_to" in entry:
            kept = [earlier for earlier in kept if earlier["step"] <= entry["rolled_back_to"]]
    return LoggedMetrics(
        training=[entry for entry in kept if "loss" in entry],
        evaluations=[entry for entry in kept if any(name.startswith("valid_") for name in entry)],
    )


def summarize_run(run_dir: Path) -> RunSummary:
    """Sum up the run in a folder. Raises UserError where there is none."""
    recipe_file = run_dir / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{run_dir} is no run's folder: it has no recipe.yaml; give what `dstrain run` wrote into")
    recipe = load_recipe(recipe_file, check_files=False).recipe
    metrics_file = run_dir / "metrics.jsonl"
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else LoggedMetrics([], [])
    status = _newest_status(run_dir)
    losses = [entry["loss"] for entry in metrics.training]
    last = metrics.training[-1] if metrics.training else {}
    evaluation = _last_word(recipe, run_dir, metrics.evaluations)
    scores = {name.removeprefix("valid_"): value for name, value in evaluation.items() if name.startswith("valid_")}
    throughput = [entry["tokens_per_second"] for entry in metrics.training[1:] or metrics.training]
    waits = [entry["data_wait_share"] for entry in metrics.training]
    failures = _failures(run_dir)
    return RunSummary(
        run=str(run_dir),
        name=recipe.name,
        **_settings(recipe),
        ranks=status.get("world_size"),
        attempts=len(list((run_dir / "attempts").glob("[0-9]*"))),
        failures=failures,
        step=last.get("step", 0),
        total_steps=status.get("total_steps") or recipe.train.steps,
        tokens=last.get("tokens"),
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        loss_best=min(losses, default=None),
        sources=_last_of_sources(metrics.training),
        tokens_per_second=median(throughput) if throughput else None,
        data_wait_share=sum(waits) / len(waits) if waits else None,
        goodput=last.get("goodput"),
        newest_checkpoint_step=_newest_checkpoint_step(run_dir),
        evaluation={name: value for name, value in scores.items() if isinstance(value, int | float)},
        evaluation_step=evaluation.get("step"),
        classification=scores.get("report"),
        test=_test_scores(run_dir),
        settings=_digest_but_for_chance(recipe),
        chance=_chance(recipe),
    )


def _last_of_sources(training: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By source, the newest value of each number; a step that had no row of a source measured no loss of it."""
    newest: dict[str, dict[str, Any]] = {}
    for entry in training:
        for name, measured in entry.get("sources", {}).items():
            known = {key: value for key, value in measured.items() if value is not None}
            newest[name] = dict.fromkeys(measured) | newest.get(name, {}) | known
    return newest


def scores_in_words(run_dir: Path) -> list[str]:
    """The last scores of a run, a line for each held-out set: what somebody who waited for it wants to know first."""
    metrics_file = run_dir / "metrics.jsonl"
    evaluations = read_metrics(metrics_file).evaluations if metrics_file.is_file() else []
    last = evaluations[-1] if evaluations else {}
    valid = {name.removeprefix("valid_"): value for name, value in last.items() if name.startswith("valid_")}
    sets = {"held out": valid, "test set": _test_scores(run_dir)}
    lines = []
    for name, scores in sets.items():
        numbers = [f"{key} {value:.3f}" for key, value in scores.items() if isinstance(value, float)]
        lines += [f"{name}: {', '.join(numbers)}"] if numbers else []
    page = run_dir / "report.html"
    return [*lines, f"report: {page}"] if page.is_file() else lines


@dataclass(frozen=True)
class Spread:
    """A score over several runs. `deviation` is that of a sample."""

    mean: float
    deviation: float
    least: float
    most: float
    runs: int


def spreads(runs: Sequence[RunSummary]) -> dict[str, Spread]:
    """By name, the scores that at least two of the runs have."""
    found = {}
    for kind, scores in (("held-out", [run.evaluation for run in runs]), ("test", [run.test for run in runs])):
        for name in dict.fromkeys(name for each in scores for name in each):
            values = [each[name] for each in scores if name in each]
            if len(values) > 1:
                found[f"{kind} {name}"] = Spread(fmean(values), stdev(values), min(values), max(values), len(values))
    return found


def differ_by_chance_alone(runs: Sequence[RunSummary]) -> bool:
    """Whether there are several, of one recipe with seeds or folds of their own."""
    return len({run.chance for run in runs}) == len(runs) > 1 and len({run.settings for run in runs}) == 1


def _test_scores(run_dir: Path) -> dict[str, float]:
    try:
        scores = json.loads((run_dir / "test.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _last_word(recipe: Recipe, run_dir: Path, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation of the weights that a run has: of the best ones with early stopping, else the last."""
    if not evaluations:
        return {}
    newest = next(iter(committed(run_dir)), None) if recipe.early_stopping is not None else None
    with contextlib.suppress(UserError):  # a damaged checkpoint
        best = Manifest.read(newest).best if newest is not None else None
        if best is not None:
            return next((entry for entry in evaluations if entry["step"] == best["step"]), evaluations[-1])
    return evaluations[-1]


def _digest_but_for_chance(recipe: Recipe) -> str:
    values = {key: value for key, value in flat_values(recipe).items() if key not in (*CHANCE, "name")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _chance(recipe: Recipe) -> str:
    folds = None if isinstance(recipe, PretrainingRecipe) else recipe.data.folds
    fold = "" if isinstance(recipe, PretrainingRecipe) or folds is None else f", fold {recipe.data.fold} of {folds}"
    return f"{recipe.train.seed} and {recipe.data.seed}{fold}"


def _settings(recipe: Recipe) -> dict[str, str]:
    model, train, optimizer = recipe.model, recipe.train, recipe.optimizer
    try:
        shape = model_shape(model)
        layers = " + ".join(str(layers) for layers in shape.layer_counts)
        size = f", {layers} layers × {shape.hidden_size}, {shape.heads} heads"
    except UserError:
        size = ""  # the pretrained folder has gone since
    offload = "".join(
        f", {part} on the CPU"
        for part, place in (("optimizer", train.zero.offload_optimizer), ("parameters", train.zero.offload_params))
        if place == "cpu"
    )
    return {
        "task": recipe.task,
        "model": f"{model.architecture}{size}",
        "weights": f"pretrained: {_shown(model.pretrained)}" if model.pretrained else f"random, seed {train.seed}",
        "data": _data(recipe),
        "batch": _batch(recipe),
        "optimizer": f"{optimizer.name}, {optimizer.learning_rate:g} {recipe.schedule.name}",
        "numerics": f"{train.precision}, ZeRO-{train.zero.stage}{offload}"
        + (", activation checkpointing" if model.activation_checkpointing else ""),
    }


def _batch(recipe: Recipe) -> str:
    """Rows and tokens of a global step, where they change in the order of the phases."""
    own = recipe.train.global_batch_rows, recipe.data.row_tokens
    phases = recipe.phases if isinstance(recipe, PretrainingRecipe) else ()
    of_phases = [(p.train.global_batch_rows or own[0], p.data.sequence_length or own[1]) for p in phases]
    distinct = [batch for batch, _ in groupby(of_phases or [own])]
    return " → ".join(f"{rows} rows × {tokens} tokens" for rows, tokens in distinct)


def _data(recipe: Recipe) -> str:
    """Where the training data lies; of a mixture, with the names of its sources."""
    if not isinstance(recipe, PretrainingRecipe):
        return _shown(recipe.data.train)
    shards = {name: _shown(source.shards) for name, source in recipe.data.training_sources.items()}
    return ", ".join(f"{name}: {where}" for name, where in shards.items()) if recipe.data.sources else shards["train"]


def _shown(path: str) -> str:
    """An absolute path as the user would write it from here."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _newest_status(run_dir: Path) -> dict[str, Any]:
    files = sorted((run_dir / "status").glob("*.json"), key=lambda path: path.stat().st_mtime)
    content = _json(files[-1]) if files else None
    return content or {}


def _newest_checkpoint_step(run_dir: Path) -> int | None:
    return max((step_of(folder) or 0 for folder in committed(run_dir) if (folder / MANIFEST).exists()), default=None)


def _failures(run_dir: Path) -> list[str]:
    """`attempt 1: rank 1 on node7 killed by SIGKILL`, from each attempt's verdict."""
    verdicts = [Verdict.read(file.parent) for file in sorted((run_dir / "attempts").glob(f"*/{VERDICT_FILE}"))]
    return [
        f"attempt {verdict.attempt}: {failed(verdict.first)} {how_it_failed(verdict.first)}"
        for verdict in verdicts
        if verdict is not None
    ]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
