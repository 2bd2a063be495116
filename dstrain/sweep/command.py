"""`dstrain sweep RECIPE`: search on this machine with `--jobs` workers, or with as many jobs of a SLURM array."""

import json
import os
import signal
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from dstrain.errors import EXIT_DONE, EXIT_RESTART_ME, RecipeError, UserError
from dstrain.launch.local import devices
from dstrain.recipe.load import LoadedRecipe, load_recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.recipe.sweep import Sweep, values_to_try
from dstrain.sweep.array import submit_array
from dstrain.sweep.study import finished, open_study, planned_trials
from dstrain.sweep.worker import Sweeping, work

BEST = "best.yaml"


def sweep_command(args: Namespace) -> int:
    """`dstrain sweep RECIPE [key=value …] [--dir DIR] [--jobs N] [--on PROFILE] [--json]`.

    Returns:
        0 when all trials are done, or SLURM has accepted the jobs; 75 when it was stopped.

    Raises:
        UserError: the recipe, its `sweep:` section or the folder cannot be used, or no trial succeeds.
    """
    loaded = load_recipe(args.recipe, args.overrides)
    if loaded.sweep is None:
        raise UserError(f"{args.recipe} has no `sweep:` section; docs/sweeps.md shows one")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1 run at a time")
    require_legal(args, loaded.sweep)
    folder = Path(args.dir or Path("runs") / f"{loaded.recipe.name}-sweep").expanduser().resolve()
    if args.on is not None:
        return submit_array(args, loaded.recipe.name, folder)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    identity = loaded.recipe.model_dump(mode="json", by_alias=True)
    shared = args.worker is not None
    studies = [open_study(folder, loaded.sweep, identity, shared=shared) for _ in range(args.jobs)]
    options = ["--max-restarts", str(args.max_restarts)]
    ranks = args.procs_per_node or (max(1, devices() // args.jobs) if args.jobs > 1 and devices() else None)
    options += ["--procs-per-node", str(ranks)] if ranks else []
    say = _say_to_stderr if args.json else print
    keeps_best = loaded.recipe.early_stopping is not None
    sweeping = Sweeping(folder, args.recipe, args.overrides, loaded.sweep, options, keeps_best, stop, say)
    with ThreadPoolExecutor(args.jobs) as pool:
        working = [
            pool.submit(_working, sweeping, study, job_environment(job, args.jobs, ranks or 1))
            for job, study in enumerate(studies)
        ]
    for worker in working:
        worker.result()
    study = studies[0]
    summary = write_best(study, folder, args, loaded)
    print(json.dumps(summary, indent=2, ensure_ascii=False) if args.json else summary_text(study, folder, loaded.sweep))
    return EXIT_RESTART_ME if stop.is_set() else EXIT_DONE


def require_legal(args: Namespace, sweep: Sweep) -> None:
    """Try the ends of each range and every choice, one key at a time. Raises RecipeError: all that is not legal."""
    problems = []
    for key, searched in sweep.parameters.items():
        for value in values_to_try(searched):
            try:
                others = [override for override in args.overrides if override.partition("=")[0] != key]
                load_recipe(args.recipe, [*others, f"{key}={json.dumps(value, ensure_ascii=False)}"])
            except RecipeError as error:
                problems += [f"sweep.parameters.{key}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))


def job_environment(job: int, jobs: int, ranks: int) -> dict[str, str]:
    """The environment of one worker's runs: with several workers, its share of the devices and of the cores."""
    environment = dict(os.environ)
    if jobs > 1:
        count = devices()
        if count:
            mine = [str((job * ranks + index) % count) for index in range(ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))))
    return environment


def _working(sweeping: Sweeping, study: optuna.Study, environment: dict[str, str]) -> None:
    try:
        work(sweeping, study, environment)
    except BaseException:
        sweeping.stop.set()  # the other workers end too
        raise


def _say_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- results


def write_best(study: optuna.Study, folder: Path, args: Namespace, loaded: LoadedRecipe) -> dict[str, Any]:
    """Write the best trial's recipe to best.yaml, and sum up all of them as JSON."""
    ranked = finished(study)
    if ranked:
        best = ranked[0]
        others = [override for override in args.overrides if override.partition("=")[0] not in best.params]
        values = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in best.params.items()]
        recipe = load_recipe(args.recipe, [*others, *values]).recipe
        assert loaded.sweep is not None
        heading = (
            f"# The best of {len(ranked)} trials of {args.recipe}: {loaded.sweep.metric} {best.value:.6g}.\n"
            f"# {', '.join(values)}\n#\n# command:   dstrain run {folder / BEST}\n"
        )
        temporary = folder / f".{BEST}.new"
        temporary.write_text(heading + resolved_yaml(recipe), encoding="utf-8")
        temporary.replace(folder / BEST)
    return {
        "best": str(folder / BEST) if ranked else None,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "parameters": trial.params,
                "run": str(folder / f"trial-{trial.number:04d}"),
            }
            for trial in study.get_trials(deepcopy=False)
        ],
    }


def summary_text(study: optuna.Study, folder: Path, sweep: Sweep) -> str:
    """The best trials, how the others ended, which key mattered, and what to do next."""
    trials, ranked = study.get_trials(deepcopy=False), finished(study)
    lines = [f"{'trial':>5}  {sweep.metric:>12}  values"]
    for trial in ranked[:10]:
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in trial.params.items())
        lines.append(f"{trial.number:5}  {trial.value:12.6g}  {values}")
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    words = {TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed", TrialState.RUNNING: "to be gone on with"}
    rest = ", ".join(f"{counts[state]} {text}" for state, text in words.items() if counts[state])
    lines.append(f"{len(ranked)} of {planned_trials(sweep)} trials done{f'; {rest}' if rest else ''}")
    if ranked:
        lines.append(f"best: dstrain run {folder / BEST}; compare: dstrain report {folder}/trial-*")
    if counts[TrialState.RUNNING] or len(trials) < planned_trials(sweep):
        lines.append("the same command goes on with it")
    return "\n".join(lines)
