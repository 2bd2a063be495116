"""A debug run: a profile with a `debug` section. A few steps of the recipe, in this terminal, in a folder of its own.

Without a supervisor: the terminal is that of one rank, so that `breakpoint()` works there, and nothing restarts. Other
ranks, if there are any, print into their logs. Each debug run begins anew.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.base import environment
from dstrain.base.ports import free_port
from dstrain.base.processes import ATTEMPT_MARK, Process, end_marked, start
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, UserError
from dstrain.observe.debug_text import ORDERS, REPORT, report_text
from dstrain.plan import batch_plan
from dstrain.preflight.preflight import check_launch
from dstrain.recipe.schema import Recipe
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.prepare import open_corpus, write_recipe
from dstrain.rundir.run_folder import attempt_folder, exclusive
from dstrain.transport.cluster import supervisors_python
from dstrain.transport.command import Job, shell_comment
from dstrain.transport.profile import Profile
from dstrain.transport.stops import Stops

ENTRY = "dstrain.train.debugged:run_rank"
LENGTH_KEYS = ("train.steps", "train.tokens", "train.epochs")
_OF_A_RUN = ("attempts", "checkpoints", "status", "tensorboard", "ledger.jsonl", "metrics.jsonl", REPORT)
_PEERS_GRACE_SECONDS = 10.0  # for the other ranks, once one has ended


@dataclass(frozen=True)
class Rank:
    """One process of a debug run."""

    number: int
    arguments: tuple[str, ...]
    environment: dict[str, str]  # what is added to that of the command
    has_terminal: bool


def debug_command(args: argparse.Namespace, profile: Profile, recipe: Recipe) -> int:
    """`dstrain run RECIPE --on launch/debug.yaml [--pdb RANK]`.

    Returns:
        0 done or stopped, 2 the input is wrong, 1 a rank failed.

    Raises:
        UserError: the folder holds a real run, the rank does not exist, or there is no terminal for a debugger.
    """
    assert profile.debug is not None
    ranks = args.procs_per_node or profile.procs_per_node or 1
    shown = 0 if args.pdb is None else args.pdb
    if not 0 <= shown < ranks:
        raise UserError(f"--pdb {args.pdb}: {ranks} ranks are numbered 0 to {ranks - 1}; give one of them")
    if args.pdb is not None and not sys.stdin.isatty() and not args.dry_run:
        raise UserError(f"--pdb {args.pdb}: standard input is not a terminal; run it in one, without a pipe")
    batch = batch_plan(recipe, ranks)
    run_dir = Path(args.run_dir or Path("runs") / f"{recipe.name}-debug").expanduser().resolve()
    _require_own(run_dir)
    has_length = any(override.partition("=")[0] in LENGTH_KEYS for override in args.overrides)
    steps = None if has_length else profile.debug.steps
    checkpoint = recipe.checkpoint.model_copy(update={"storage": None})  # the store is the real run's
    recipe = recipe.model_copy(update={"checkpoint": checkpoint})
    processes = plan(profile, run_dir, ranks, shown, free_port())
    if args.dry_run:
        print(shell_comment(f"{batch}\neach debug run begins anew in {run_dir}"))
        print("\n".join(as_shell(rank) for rank in processes))
        return EXIT_DONE
    with exclusive(run_dir):
        _require_own(run_dir)
        for name in _OF_A_RUN:
            _delete(run_dir / name)
        check_launch(Job(recipe.name, run_dir, ranks), recipe)
        open_corpus(recipe)
        orders = {"steps": steps, "detect_anomaly": profile.debug.detect_anomaly, "pdb_rank": args.pdb}
        write_json(run_dir / ORDERS, orders)
        write_recipe(run_dir, recipe)
        length = "to the end of the recipe" if steps is None else f"{steps} steps"
        print(f"{recipe.name}: a debug run, {length}: {batch}; in {run_dir}, which is not the run's folder", flush=True)
        code = _run(processes, attempt_folder(run_dir, 1))
        report = run_dir / REPORT
        if report.exists():
            print(report_text(json.loads(report.read_text())), flush=True)
    return code


def plan(profile: Profile, run_dir: Path, ranks: int, shown: int, port: int) -> list[Rank]:
    """Every rank's command, in the environment of `dstrain run` and what the profile adds."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    found = []
    for number in range(ranks):
        environment = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo",
            ATTEMPT_MARK: str(attempt_folder(run_dir, 1)),
            **profile.environment,
        }
        arguments = [supervisors_python(profile), "-u", "-m", "dstrain.rank", "--run-dir", str(run_dir)]
        arguments += ["--attempt", "1", "--entry", ENTRY]
        if number == shown:
            arguments.append("--terminal")
        found.append(Rank(number, tuple(arguments), environment, number == shown))
    return found


def as_shell(rank: Rank) -> str:
    """The same for a shell."""
    words = shlex.join([*(f"{name}={value}" for name, value in sorted(rank.environment.items())), *rank.arguments])
    return f"env {words}{'' if rank.has_terminal else ' &'}"


def _run(ranks: Sequence[Rank], folder: Path) -> int:
    """Start them, stay until all have ended, and leave none."""
    stops, passed_on = Stops(), False
    started: dict[int, Process] = {}
    terminal = next(rank.number for rank in ranks if rank.has_terminal)
    with stops.listening():  # Ctrl-C reaches the rank with the terminal by itself
        try:
            for rank in ranks:
                started[rank.number] = start(
                    [*rank.arguments, "--parent-pid", str(os.getpid())],
                    environment=environment.for_child(rank.environment),
                    stdin="inherited" if rank.has_terminal else "nothing",
                    own_session=not rank.has_terminal,
                )
            ended_at = None
            while any(process.poll() is None for process in started.values()):
                time.sleep(0.05)
                if stops.signal is not None and not passed_on:
                    passed_on = True
                    for number, process in started.items():
                        if number != terminal or stops.signal != "SIGINT":
                            process.terminate()
                # Others may wait for a rank that has ended; but not while somebody looks at this one in a debugger.
                if started[terminal].poll() is not None:
                    ended_at = ended_at or time.monotonic()
                    if time.monotonic() - ended_at > _PEERS_GRACE_SECONDS:
                        break
        finally:
            for process in started.values():
                if process.poll() is None:
                    process.kill()
            end_marked(folder)
    codes = {number: process.wait() for number, process in started.items()}
    for number, code in sorted(codes.items()):
        if code and number != terminal:
            print(f"rank {number} ended with code {code}; its log is in {folder / 'logs'}", file=sys.stderr)
    if EXIT_USER_ERROR in codes.values():
        return EXIT_USER_ERROR
    return EXIT_FAILURE if any(codes.values()) else EXIT_DONE


def _require_own(run_dir: Path) -> None:
    """A debug run deletes what an earlier one left; never anything of a real run."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file; name a folder, which may be new")
    if any((run_dir / name).exists() for name in (*_OF_A_RUN, "recipe.yaml")) and not (run_dir / ORDERS).exists():
        raise UserError(
            f"{run_dir} holds a run that is not a debug run, and a debug run begins anew each time; give another "
            f"--run-dir, or none for runs/NAME-debug"
        )


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
