"""A sweep in a queue: an array of jobs, each a worker with a node of its own, on one journal on the shared disk."""

import sys
from argparse import Namespace
from pathlib import Path

from dstrain.base.environment import working_folder
from dstrain.errors import EXIT_DONE, UserError
from dstrain.transport.profile import Profile, load_profile
from dstrain.transport.submission import WorkerArray
from dstrain.transport.transport import TRANSPORTS, queue_names

SCRIPT, LOG_STEM = "sweep.sbatch", "slurm-"


def submit_array(args: Namespace, name: str, folder: Path) -> int:
    """Write the batch script and hand it to the queue; with `--dry-run` print it.

    Raises:
        UserError: the profile has no queue, or the queue refuses.
    """
    profile = load_profile(args.on)
    queue = TRANSPORTS[profile.transport].queue
    if queue is None:
        needed = " or ".join(queue_names())
        raise UserError(f"{args.on} has transport: {profile.transport}; a sweep over nodes needs transport: {needed}")
    if profile.container:
        raise UserError(f"{args.on} has a container; a sweep's workers run outside of one, so delete it")
    ranks = args.procs_per_node or profile.procs_per_node
    script = queue.array_script(worker_array(args, profile, name, folder, ranks))
    if args.dry_run:
        print(script, end="")
        return EXIT_DONE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    job = queue.submit(folder / SCRIPT)
    print(f"{name}: submitted as job {job}, {args.jobs} workers; see {folder / f'{LOG_STEM}*.log'}")
    seeds = f" --seeds {args.seeds}" if args.seeds is not None else ""
    again = f"dstrain sweep {args.recipe}{seeds} --dir {folder} --worker 1000"
    print(f"results so far, and the rest of the trials here: {again}")
    return EXIT_DONE


def worker_array(args: Namespace, profile: Profile, name: str, folder: Path, ranks: int | None) -> WorkerArray:
    """The workers: each is this command again."""
    command = ["-u", "-m", "dstrain", "sweep", args.recipe, *args.overrides, "--dir", str(folder)]
    command += ["--seeds", str(args.seeds)] if args.seeds is not None else []
    command += ["--max-restarts", str(args.max_restarts), *(["--procs-per-node", str(ranks)] if ranks else [])]
    return WorkerArray(
        name=name,
        count=args.jobs,
        folder=folder,
        log_stem=LOG_STEM,
        working_folder=working_folder(),
        profile=profile,
        python=None if profile.venv is not None else sys.executable,
        arguments=(*command, "--worker"),
    )
