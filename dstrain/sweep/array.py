"""A sweep on SLURM: an array of jobs, each a worker with a node of its own, on one journal on the shared disk."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from dstrain.base.environment import working_folder
from dstrain.errors import EXIT_DONE, UserError
from dstrain.transport import slurm
from dstrain.transport.profile import Profile, load_profile
from dstrain.transport.submission import asked_of_slurm

SCRIPT, LOG = "sweep.sbatch", "slurm-%a.log"
LEAD_SECONDS = 120  # before the time limit: the worker's run saves and stops


def submit_array(args: Namespace, name: str, folder: Path) -> int:
    """Write the batch script and hand it to SLURM; with `--dry-run` print it.

    Raises:
        UserError: the profile is not for one node of SLURM each, or SLURM refuses.
    """
    profile = load_profile(args.on)
    if profile.transport != "slurm":
        raise UserError(f"{args.on} has transport: {profile.transport}; a sweep over nodes needs transport: slurm")
    if profile.container:
        raise UserError(f"{args.on} has a container; a sweep's workers run outside of one, so delete it")
    ranks = args.procs_per_node or profile.procs_per_node
    script = array_script(args, profile, name, folder, working_folder(), ranks)
    if args.dry_run:
        print(script, end="")
        return EXIT_DONE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    job = slurm.submit(folder / SCRIPT)
    print(f"{name}: submitted as job {job}, {args.jobs} workers; see {folder / LOG.replace('%a', '*')}")
    seeds = f" --seeds {args.seeds}" if args.seeds is not None else ""
    again = f"dstrain sweep {args.recipe}{seeds} --dir {folder} --worker 1000"
    print(f"results so far, and the rest of the trials here: {again}")
    return EXIT_DONE


def array_script(args: Namespace, profile: Profile, name: str, folder: Path, working: Path, ranks: int | None) -> str:
    """The batch script. Pure."""
    settings = profile.slurm
    assert settings is not None
    directives = [
        f"job-name={name}-sweep",
        f"array=0-{args.jobs - 1}",
        "nodes=1",
        *asked_of_slurm(settings),
        "requeue" if settings.requeue else "no-requeue",
        f"signal=B:USR1@{LEAD_SECONDS}",
        f"export={','.join(('HOME', 'USER', 'LOGNAME', 'SHELL', *profile.pass_environment))}",
        "output=/dev/null",
    ]
    command = ["-u", "-m", "dstrain", "sweep", args.recipe, *args.overrides, "--dir", str(folder)]
    command += ["--seeds", str(args.seeds)] if args.seeds is not None else []
    command += ["--max-restarts", str(args.max_restarts), *(["--procs-per-node", str(ranks)] if ranks else [])]
    log = shlex.quote(str(folder / LOG.replace("%a", "")).removesuffix(".log"))
    lines = ["#!/bin/bash --login", *(f"#SBATCH --{directive}" for directive in directives), ""]
    lines += [f'exec >>{log}"$SLURM_ARRAY_TASK_ID.log" 2>&1', f"cd -- {shlex.quote(str(working))}"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()]
    lines += [f"module load {shlex.quote(module)}" for module in profile.modules]
    if profile.venv is not None:
        lines.append(f"source {shlex.quote(str(Path(profile.venv).expanduser() / 'bin/activate'))}")
    python = "python" if profile.venv is not None else shlex.quote(sys.executable)
    lines += [
        "",
        "# The warning before the time limit, and preemption: the worker's run stops at a checkpoint, exit code 75.",
        f'{python} {shlex.join(command)} --worker "$SLURM_ARRAY_TASK_ID" & worker=$!',
        "trap 'kill -TERM $worker' USR1 TERM",
        "wait $worker; code=$?",
        "while kill -0 $worker 2>/dev/null; do wait $worker; code=$?; done",
    ]
    if settings.requeue:
        lines.append('[ $code != 75 ] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"')
    lines.append("exit $code")
    return "\n".join([*lines, ""])
