"""`dstrain sweep RECIPE`: search on this machine with `--jobs` workers, or with as many jobs of a SLURM array."""

import json
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from dstrain.base.devices import count_devices
from dstrain.base.environment import for_child
from dstrain.errors import EXIT_DONE, EXIT_RESTART_ME, RecipeError, UserError
from dstrain.recipe.load import load_recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.recipe.sweep import Sweep, assignments, keys_of, values_to_try
from dstrain.report.runs import spreads, summarize_run
from dstrain.report.text import spread_text
from dstrain.sweep.array import submit_array
from dstrain.sweep.repeat import fixed_split, repeats, report_repeats
from dstrain.sweep.study import by_values, finished, open_study, planned_trials, trial_folder
from dstrain.sweep.worker import Sweeping, work

BEST = "best.yaml"


def sweep_command(args: Namespace) -> int:
    """`dstrain sweep RECIPE [key=value …] [--seeds N] [--dir DIR] [--jobs N] [--on PROFILE] [--json]`.

    Returns:
        0 when all trials are done, or SLURM has accepted the jobs; 75 when it was stopped.

    Raises:
        UserError: the recipe, its `sweep:` section or the folder cannot be used, or no trial succeeds.
    """
    loaded, overrides = load_recipe(args.recipe, args.overrides), list(args.overrides)
    if args.seeds is not None:
        sweep, kind = repeats(loaded.recipe, args.seeds), f"{args.seeds}-seeds"
        overrides += fixed_split(loaded.recipe)
    elif loaded.sweep is not None:
        sweep, kind = loaded.sweep, "sweep"
    else:
        remedy = "give --seeds 3 to repeat it, or search as docs/sweeps.md shows"
        raise UserError(f"{args.recipe} has no `sweep:` section; {remedy}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1 run at a time")
    require_legal(args, sweep)
    folder = Path(args.dir or Path("runs") / f"{loaded.recipe.name}-{kind}").expanduser().resolve()
    if args.on is not None:
        return submit_array(args, loaded.recipe.name, folder)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    identity = loaded.recipe.model_dump(mode="json", by_alias=True)
    shared = args.worker is not None
    studies = [open_study(folder, sweep, identity, shared=shared) for _ in range(args.jobs)]
    options = ["--max-restarts", str(args.max_restarts)]
    ranks = args.procs_per_node or (max(1, count_devices() // args.jobs) if args.jobs > 1 and count_devices() else None)
    options += ["--procs-per-node", str(ranks)] if ranks else []
    say = _say_to_stderr if args.json else print
    keeps_best = loaded.recipe.early_stopping is not None
    sweeping = Sweeping(folder, args.recipe, overrides, sweep, options, keeps_best, stop, say)
    with ThreadPoolExecutor(args.jobs) as pool:
        working = [
            pool.submit(_working, sweeping, study, job_environment(job, args.jobs, ranks or 1))
            for job, study in enumerate(studies)
        ]
    for worker in working:
        worker.result()
    study = studies[0]
    summary = write_best(study, folder, args, sweep) if args.seeds is None else write_repeats(study, folder)
    text = summary_text if args.seeds is None else repeats_text
    print(json.dumps(summary, indent=2, ensure_ascii=False) if args.json else text(study, folder, sweep))
    return EXIT_RESTART_ME if stop.is_set() else EXIT_DONE


def require_legal(args: Namespace, sweep: Sweep) -> None:
    """Try the ends of each range and every choice, one key at a time. Raises RecipeError: all that is not legal."""
    problems = []
    for parameter, searched in sweep.parameters.items():
        for value in values_to_try(searched):
            try:
                load_recipe(args.recipe, [*_others(args.overrides, [parameter]), *assignments({parameter: value})])
            except RecipeError as error:
                problems += [f"sweep.parameters.{parameter}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))


def _others(overrides: Sequence[str], parameters: Iterable[str]) -> list[str]:
    """The overrides of keys that no parameter sets."""
    searched = {key for parameter in parameters for key in keys_of(parameter)}
    return [override for override in overrides if override.partition("=")[0] not in searched]


def job_environment(job: int, jobs: int, ranks: int) -> dict[str, str]:
    """The environment of one worker's runs: with several workers, its share of the devices and of the cores."""
    environment = for_child()
    if jobs > 1:
        count = count_devices()
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


def write_best(study: optuna.Study, folder: Path, args: Namespace, sweep: Sweep) -> dict[str, Any]:
    """Write the best values' recipe to best.yaml, and sum up all trials as JSON.

    Trials that differ by chance alone count together: what is best is their mean, and the recipe has its own seeds.
    """
    ranked = by_values(study)
    if ranked:
        best = ranked[0]
        values = assignments(best.values)
        recipe = load_recipe(args.recipe, [*_others(args.overrides, best.values), *values]).recipe
        trials = len(finished(study))
        of = f", the mean of {len(best.numbers)} runs" if len(best.numbers) > 1 else ""
        heading = (
            f"# The best of {trials} trials of {args.recipe}: {sweep.metric} {best.mean:.6g}{of}.\n"
            f"# {', '.join(values)}\n#\n# command:   dstrain run {folder / BEST}\n"
        )
        temporary = folder / f".{BEST}.new"
        temporary.write_text(heading + resolved_yaml(recipe), encoding="utf-8")
        temporary.replace(folder / BEST)
    return {"best": str(folder / BEST) if ranked else None, "trials": _trials(study, folder)}


def write_repeats(study: optuna.Study, folder: Path) -> dict[str, Any]:
    """Write the report of all runs that are done, and sum up their scores as JSON."""
    done = sorted(finished(study), key=lambda trial: trial.number)
    runs = [(trial_folder(folder, trial.number), trial.params) for trial in done]
    files = report_repeats(folder, runs) if runs else {}
    scores = spreads([summarize_run(run) for run, _ in runs])
    return {
        "scores": {name: asdict(spread) for name, spread in scores.items()},
        "files": {name: str(path) for name, path in files.items()},
        "trials": _trials(study, folder),
    }


def _trials(study: optuna.Study, folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.state == TrialState.COMPLETE else None,
            "parameters": trial.params,
            "run": str(trial_folder(folder, trial.number)),
        }
        for trial in study.get_trials(deepcopy=False)
    ]


def summary_text(study: optuna.Study, folder: Path, sweep: Sweep) -> str:
    """The best trials, how the others ended, and what to do next."""
    ranked = by_values(study)
    lines = [f"{'trial':>5}  {sweep.metric:>12}  values"]
    for group in ranked[:10]:
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in group.values.items())
        spread = f" ± {group.deviation:.2g} ({len(group.numbers)} runs)" if len(group.numbers) > 1 else ""
        lines.append(f"{group.numbers[0]:5}  {group.mean:12.6g}{spread}  {values}")
    lines += _how_far(study, sweep)
    if ranked:
        lines.append(f"best: dstrain run {folder / BEST}; compare: dstrain report {folder}/trial-*")
    return "\n".join([*lines, *_to_go_on(study, sweep)])


def repeats_text(study: optuna.Study, folder: Path, sweep: Sweep) -> str:
    """Mean and deviation of all scores, how the runs ended, and what to do next."""
    runs = [summarize_run(trial_folder(folder, trial.number)) for trial in finished(study)]
    lines = [spread_text(spreads(runs))] if runs else []
    lines += _how_far(study, sweep)
    if runs:
        lines.append(f"report: {folder / 'report.html'}; compare: dstrain report {folder}/trial-*")
    return "\n".join([*lines, *_to_go_on(study, sweep)])


def _how_far(study: optuna.Study, sweep: Sweep) -> list[str]:
    trials = study.get_trials(deepcopy=False)
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    words = {TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed", TrialState.RUNNING: "to be gone on with"}
    rest = ", ".join(f"{counts[state]} {text}" for state, text in words.items() if counts[state])
    done = counts[TrialState.COMPLETE]
    return [f"{done} of {planned_trials(sweep)} trials done{f'; {rest}' if rest else ''}"]


def _to_go_on(study: optuna.Study, sweep: Sweep) -> list[str]:
    trials = study.get_trials(deepcopy=False)
    left = len(trials) < planned_trials(sweep) or any(trial.state == TrialState.RUNNING for trial in trials)
    return ["the same command goes on with it"] if left else []
