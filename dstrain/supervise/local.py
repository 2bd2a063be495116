"""`dstrain run` on this machine, in the environment of the command."""

import argparse
import os
import sys
from pathlib import Path

from dstrain.base import environment
from dstrain.base.devices import count_devices
from dstrain.base.ports import free_port
from dstrain.checkpoint.store_owner import owned_store
from dstrain.errors import EXIT_DONE, UserError
from dstrain.observe.progress import RunProgress
from dstrain.plan import batch_plan
from dstrain.preflight.preflight import check_launch
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.rundir.prepare import check_recipe, open_corpus, write_recipe
from dstrain.rundir.run_folder import TRAINING, exclusive, newest_checkpoint, next_attempt
from dstrain.supervise.supervise import supervise
from dstrain.transport.command import Job, command, shell_comment, with_users_choice


def run_command(args: argparse.Namespace) -> int:
    """`dstrain run RECIPE [key=value …] [--procs-per-node N] [--run-dir DIR] [--max-restarts N] [--allow data-change]
    [--dry-run]`.

    Returns:
        The exit code of `supervise`; 0 for a dry run.

    Raises:
        UserError: the recipe, the number of processes, or the run folder cannot be used.
    """
    recipe = load_recipe(args.recipe, args.overrides).recipe
    ranks = args.procs_per_node or count_devices() or 1
    batch = batch_plan(recipe, ranks)
    run_dir = run_folder(args, recipe)
    job = Job(recipe.name, run_dir, ranks, args.max_restarts, entry=args.entry or TRAINING)
    check_recipe(run_dir, recipe, args.allow)
    if args.dry_run:
        print(shell_comment(str(batch)))
        print(dry_run(job))
        return EXIT_DONE
    return run_in_folder(job, recipe, args.allow)


def run_in_folder(job: Job, recipe: Recipe, allow: str | None, said: str | None = None) -> int:
    """Lock the run's folder, look whether it is safe to start, and supervise the job from here.

    Args:
        job: the run.
        recipe: its recipe.
        allow: `--allow`.
        said: to be told first, if anything.

    Returns:
        The exit code of `supervise`.

    Raises:
        UserError: the folder is another run's, the launch cannot work, or the corpus cannot be read.
    """
    with exclusive(job.run_dir):
        check_recipe(job.run_dir, recipe, allow)  # another supervisor may have made it its own before the lock
        job = check_launch(job, recipe)
        open_corpus(recipe)
        write_recipe(job.run_dir, recipe, allow)
        with owned_store(job.run_dir), RunProgress(sys.stderr, recipe.name) as progress:
            if said is not None:
                progress.note(f"{recipe.name}: {said}")
            return supervise(job, progress)


def run_folder(args: argparse.Namespace, recipe: Recipe) -> Path:
    """The run's folder as the command line says, which need not exist yet.

    Raises:
        UserError: it is a file, or the number of restarts is negative.
    """
    run_dir = Path(args.run_dir or Path("runs") / recipe.name).expanduser()
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file; name a folder, which may be new")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts} is negative; 0 means that a failure ends the run")
    return run_dir


def dry_run(job: Job) -> str:
    """What would be started, as lines for a shell that do the same without the supervisor."""
    attempt = next_attempt(job.run_dir)
    launch = command(job, attempt, sys.executable, len(os.sched_getaffinity(0)), free_port(), None)
    launch = with_users_choice(launch, environment.variables())
    heading = f"attempt {attempt}, {newest_checkpoint(job.run_dir)}; the ranks read {job.run_dir / 'recipe.yaml'}"
    return f"{shell_comment(heading)}\n{launch.as_shell()}"
