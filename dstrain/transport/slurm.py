"""The commands of SLURM that a run needs. Nothing else starts them."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from dstrain.base.durations import parse_slurm_left
from dstrain.base.environment import for_child, slurm_nodes
from dstrain.errors import UserError


def submit(script: Path) -> str:
    """`sbatch`: the job's number.

    Raises:
        UserError: there is no SLURM here, or it refuses the job; with its own words.
    """
    # SBATCH_… variables would silently win over what the script, and so the profile, says.
    return _ask(["sbatch", "--parsable", str(script)], for_child(without="SBATCH_")).partition(";")[0]


def hosts_of_job() -> list[str]:
    """The nodes of the job that this process runs in, in SLURM's order."""
    return _ask(["scontrol", "show", "hostnames", slurm_nodes()]).split()


def seconds_left_of_job(job: str) -> float | None:
    """How long the job may still run; None without a limit."""
    return parse_slurm_left(_ask(["squeue", "--noheader", f"--jobs={job}", "--format=%L"]))


def state_of_job(job: str) -> str | None:
    """What SLURM calls the job's state, as RUNNING or PENDING; None if it knows of no such job any more."""
    try:
        return _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip() or None
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def cancel(job: str) -> None:
    """End a job that has not begun."""
    _ask(["scancel", job])


def ask_to_stop(job: str) -> None:
    """SIGTERM for the supervisor, which is the batch step: it saves, and does not requeue the job."""
    _ask(["scancel", "--batch", "--signal=TERM", job])


def kill_wait_seconds() -> int | None:
    """How long after SIGTERM the cluster kills a job; None where it does not say."""
    for line in _ask(["scontrol", "show", "config"]).splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "KillWait" and value.split()[0].isdecimal():
            return int(value.split()[0])
    return None


def inside_allocation(options: Sequence[str], command: Sequence[str]) -> int:
    """Run a command here while SLURM holds the nodes that `salloc` is asked for; its exit code.

    Raises:
        UserError: there is no SLURM here.
    """
    environment = for_child(without="SALLOC_")
    try:
        return subprocess.run(["salloc", "--quiet", *options, *command], env=environment, check=False).returncode
    except FileNotFoundError:
        raise UserError("salloc is not on this machine; run this where SLURM's commands are") from None


def requeue(job: str) -> None:
    """Put the job back into the queue; it is ended at once for that."""
    _ask(["scontrol", "requeue", job])


def _ask(command: Sequence[str], environment: dict[str, str] | None = None, tries: int = 5) -> str:
    """Its output. The controller may be restarting, so what is refused for that is asked again."""
    for attempt in range(tries):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not on this machine; run this where SLURM's commands are") from None
        if answer.returncode == 0:
            return answer.stdout.strip()
        words = answer.stderr.strip() or f"{command[0]} ended with code {answer.returncode}"
        if "Unable to contact" not in words and "Socket timed out" not in words:
            break
        time.sleep(2**attempt)
    raise UserError(words)
