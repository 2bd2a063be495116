"""One run from its first attempt to its end: start the ranks, show progress, pass on stops, restart after failures.

start an attempt ─► wait ─┬─ done ──────────────────────────────► 0
      ▲                   ├─ stopped at a checkpoint ───────────► 75
      │                   ├─ a node was lost, others may be had ► 75
      │                   ├─ the user's input is wrong ─────────► 2
      └── restart, perhaps
          without a node ◄┴─ failed: verdict ─► give up ────────► 1
"""

import contextlib

from dstrain.base.code_digest import PACKAGE, code_digest
from dstrain.diagnose.causes import explain
from dstrain.diagnose.verdict import VERDICT_FILE, PastFailure, Verdict, decide, first_failure, signature
from dstrain.diagnose.verdict_text import verdict_text
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESTART_ME, UserError
from dstrain.observe.progress import RunProgress
from dstrain.observe.run_record import Recorder
from dstrain.report.runs import scores_in_words
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.run_folder import attempt_folder, newest_checkpoint, next_attempt
from dstrain.supervise.attempt import Ended, run_attempt
from dstrain.transport.command import Job
from dstrain.transport.stops import Stops

EXIT_INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended


def supervise(job: Job, progress: RunProgress, stops: Stops | None = None) -> int:
    """Run `job`, whose folder is prepared and locked, until it is done or nothing sensible is left to do.

    Args:
        job: the run.
        progress: shows it.
        stops: where the caller wants to see what stopped it.

    Returns:
        The exit code: 0 done, 75 stopped at a checkpoint, 1 failed for good, 130 killed by a second Ctrl-C.

    Raises:
        UserError: a rank found the user's input to be wrong, or the package was changed between two attempts.
    """
    recorder = Recorder(job)
    with recorder.ending() as codes:
        codes.append(_supervise(job, progress, stops or Stops(), recorder))
        return codes[-1]


def _supervise(job: Job, progress: RunProgress, stops: Stops, recorder: Recorder) -> int:
    past: list[PastFailure] = []
    code = code_digest()
    with stops.listening():
        while stops.signal is None:
            if code_digest() != code:
                raise UserError(
                    f"{PACKAGE} was changed while {job.name} ran, and an attempt with other code would go unnoticed; "
                    f"the same command goes on with the code of now, {newest_checkpoint(job.run_dir)}"
                )
            number = next_attempt(job.run_dir)
            recorder.attempt(job)
            ended = run_attempt(job, number, stops, progress)
            if ended.result == "done":
                with contextlib.suppress(OSError, UserError):
                    for line in scores_in_words(job.run_dir):
                        progress.note(f"{job.name}: {line}")
                progress.note(f"{job.name}: done; everything is in {job.run_dir}")
                return EXIT_DONE
            if ended.result == "killed":
                progress.note(f"{job.name}: killed; the same command goes on from the newest checkpoint")
                return EXIT_INTERRUPTED
            if ended.result == "failed":
                verdict = judge(number, ended, past, job, stopping=stops.signal is not None)
                with contextlib.suppress(OSError):  # a full disk may be the very verdict, which is also printed
                    write_json(attempt_folder(job.run_dir, number) / VERDICT_FILE, verdict.as_json())
                if verdict.decision == "user error":
                    raise UserError(verdict.first.message)
                progress.note(verdict_text(verdict))
                if verdict.decision == "give up":
                    return EXIT_FAILURE
                if verdict.decision == "restart without the node":
                    job = job.without(verdict.first.host) or job
                if job.can_be_moved and verdict.first.is_lost_node:  # the node, not what ran on it
                    progress.note(f"{job.name}: left to the scheduler, which has other nodes")
                    return EXIT_RESTART_ME
            else:
                break
        progress.note(f"{job.name}: stopped, {newest_checkpoint(job.run_dir)}; the same command goes on from there")
        return EXIT_RESTART_ME


def judge(number: int, ended: Ended, past: list[PastFailure], job: Job, *, stopping: bool) -> Verdict:
    """The verdict on an attempt that failed; appends it to `past`."""
    first, others = first_failure(ended.failures)
    past.append(PastFailure(ended.made_progress, signature(first)))
    without = job.without(first.host)
    left = without.cluster.hosts if without is not None and without.cluster is not None else ()
    decision, reason = decide(first, past, job.max_restarts, left, job.on_hang)
    if stopping and decision in ("restart", "restart without the node"):
        decision, reason = "give up", "it failed while it was being stopped"
        if job.can_be_moved:
            reason += "; where SLURM itself stopped it, the job is in the queue again"
    cause, remedy = explain(first, ended.new_oom_kills)
    return Verdict(number, first, others, cause, remedy, decision, reason)
