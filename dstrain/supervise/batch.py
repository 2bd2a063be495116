"""The supervisor inside a queue's job, on its first node: what the batch script becomes.

    python -m dstrain.supervise.batch --run-dir DIR --code DIGEST

It starts the nodes of the job through the transport and supervises them as everywhere. Before the time limit, or when
the scheduler sends its warning, ranks save at the next step boundary; once that is committed, the job goes back into
the queue.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dstrain.base.code_digest import code_digest
from dstrain.checkpoint.store_owner import owned_store
from dstrain.diagnose import evidence
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART_ME, EXIT_USER_ERROR, UserError
from dstrain.observe.progress import RunProgress
from dstrain.observe.run_record import close_record
from dstrain.preflight.preflight import check_launch
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.rundir.run_folder import attempt_folder, exclusive, newest_checkpoint_step, next_attempt
from dstrain.rundir.timings import Timings
from dstrain.supervise.supervise import supervise
from dstrain.transport.cluster import make_cluster, nodes_in_words, stop_timeout_seconds, usable_nodes
from dstrain.transport.command import Job
from dstrain.transport.stops import Stops
from dstrain.transport.submission import Submission
from dstrain.transport.transport import TRANSPORTS, Queue

LOCK_PATIENCE_SECONDS = 60.0  # the supervisor of a node that died may hold the folder for a moment


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise the job's nodes; the exit code is that of `supervise`."""
    parser = argparse.ArgumentParser(
        prog="python -m dstrain.supervise.batch", description="supervise the nodes of a queue's job"
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--code", required=True, help="digest of the source that was submitted")
    arguments = parser.parse_args(argv)
    stops = Stops()
    try:
        with stops.listening():
            submission = Submission.read(arguments.run_dir)
            job = queue_of(submission).current_job()
            if job is None:
                raise UserError(f"this is not inside of a job of transport: {submission.profile.transport}")
            return run(submission, arguments.code, job, stops)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def run(submission: Submission, code: str, job_id: str, stops: Stops) -> int:
    """One job's part of the run."""
    run_dir, queue = submission.run_dir, queue_of(submission)
    with patient(run_dir, LOCK_PATIENCE_SECONDS):
        if code != (found := code_digest()):
            close_record(run_dir, EXIT_USER_ERROR)
            raise UserError(f"the package has changed (digest {found}, submitted was {code}); submit the run again")
        if is_done(run_dir):
            print(f"{submission.name}: done already", file=sys.stderr)
            close_record(run_dir, EXIT_DONE)
            return EXIT_DONE
        idle = attempts_without_progress(run_dir, submission.first_attempt)
        if idle > submission.max_restarts:
            words = f"{idle} attempts without a newer checkpoint, more than --max-restarts={submission.max_restarts}"
            print(f"{submission.name}: {words}; attempts/ has what became of each", file=sys.stderr)
            close_record(run_dir, EXIT_FAILURE)
            return EXIT_FAILURE
        recipe = load_recipe(run_dir / "recipe.yaml").recipe
        hosts = [host.name for host in TRANSPORTS[submission.profile.transport].hosts(submission.profile)]
        job = replace(job_on(submission, recipe, hosts, queue.seconds_left(job_id)), scheduler_job=job_id)
        if (said := nodes_in_words(submission.nodes, len(hosts), job.world // job.ranks)) is not None:
            print(f"{submission.name}: {said}", file=sys.stderr)
        # What a lost node means is left to the supervisor, which goes back into the queue.
        try:
            job = check_launch(job, recipe, lost_nodes_matter=False)
        except UserError:
            close_record(run_dir, EXIT_USER_ERROR)
            raise
        with owned_store(run_dir), RunProgress(sys.stderr, submission.name) as progress:
            exit_code = supervise(job, progress, stops)
    # Not after SIGTERM: that is `dstrain stop`, or a scheduler which requeues by itself.
    if exit_code == EXIT_RESTART_ME and queue.requeues(submission) and stops.signal != "SIGTERM":
        print(f"{submission.name}: back into the queue", file=sys.stderr, flush=True)
        queue.requeue(job_id)
    return exit_code


def queue_of(submission: Submission) -> Queue:
    """The queue that a run was handed over to."""
    queue = TRANSPORTS.named(submission.profile.transport, "transport").queue
    assert queue is not None
    return queue


def job_on(submission: Submission, recipe: Recipe, hosts: Sequence[str], seconds_left: float | None) -> Job:
    """The run on what the allocation has: as many of its nodes as there are rows for."""
    count = usable_nodes(recipe, submission.ranks, submission.nodes[0], len(hosts))
    profile = submission.profile
    timings = Timings.read(submission.run_dir)
    cluster = make_cluster(profile, hosts[:count], submission.folder, submission.code)
    return Job(
        name=submission.name,
        run_dir=submission.run_dir,
        ranks=submission.ranks,
        max_restarts=submission.max_restarts,
        shutdown_timeout_seconds=stop_timeout_seconds(profile, timings, seconds_left),
        cluster=cluster,
        on_hang=profile.on_hang,
        ends_unix=None if seconds_left is None else time.time() + seconds_left,
        can_be_moved=queue_of(submission).requeues(submission),
    )


def is_done(run_dir: Path) -> bool:
    """Whether the newest attempt came to the end of the training, after the recipe was last written."""
    folder = attempt_folder(run_dir, next_attempt(run_dir) - 1)
    outcome = folder / "outcome.json"
    written = (run_dir / "recipe.yaml").stat().st_mtime
    return evidence.outcome(folder) == "done" and outcome.stat().st_mtime > written


def attempts_without_progress(run_dir: Path, first_attempt: int) -> int:
    """How many of the attempts since `first_attempt`, one after another, began at the checkpoint that is the newest."""
    newest, count = newest_checkpoint_step(run_dir), 0
    for number in range(next_attempt(run_dir) - 1, first_attempt - 1, -1):
        try:
            began = json.loads((attempt_folder(run_dir, number) / "command.json").read_text())["checkpoint_before"]
        except (OSError, ValueError, KeyError):
            break
        if began != newest:
            break
        count += 1
    return count


@contextmanager
def patient(run_dir: Path, seconds: float) -> Iterator[None]:
    """Hold the folder's lock; wait a while for one who is about to let go of it.

    Raises:
        UserError: another process still holds it.
    """
    deadline = time.monotonic() + seconds
    while True:
        lock = exclusive(run_dir)
        try:
            lock.__enter__()
            break
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


if __name__ == "__main__":
    sys.exit(main())
