"""A run that was handed to SLURM: what its batch job needs to know, and the batch script. Pure.

The script is short on purpose: it says what SLURM has to grant, and becomes `dstrain.supervise.batch` on the first
node.
"""

import json
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.durations import parse_slurm_limit
from dstrain.transport.profile import Profile, Slurm

FILE_NAME = "submission.json"
LOG_NAME = "slurm.log"
_ALWAYS_EXPORTED = ("HOME", "USER", "LOGNAME", "SHELL")
# Directives whose keys are sbatch's options with other letters.
_DIRECTIVES: tuple[str, ...] = (
    "partition",
    "account",
    "qos",
    "time",
    "gres",
    "cpus_per_task",
    "constraint",
    "exclude",
    "reservation",
)
_DIRECTIVES += ("mail_user", "mail_type")
_SENT_EARLY_SECONDS = 60


@dataclass(frozen=True)
class Submission:
    """One run on a SLURM cluster."""

    name: str
    run_dir: Path  # absolute
    folder: Path
    profile: Profile
    supervisors_python: str
    ranks: int  # of each node
    nodes: tuple[int, int]  # fewest and most
    max_restarts: int
    code: str  # digest of the source
    chain: int | None  # how many jobs one after another; None: one that requeues itself
    first_attempt: int = 1  # since it was submitted: what failed before, a person has seen

    def as_json(self) -> dict[str, Any]:
        """What `submission.json` holds. There is no secret in it: a profile has none."""
        values = {**vars(self), "run_dir": str(self.run_dir), "folder": str(self.folder)}
        return {**values, "profile": self.profile.model_dump(mode="json")}

    @classmethod
    def read(cls, run_dir: Path) -> "Submission":
        """Back from the run's folder."""
        values = json.loads((run_dir / FILE_NAME).read_text())
        values |= {"run_dir": Path(values["run_dir"]), "folder": Path(values["folder"])}
        values |= {"nodes": tuple(values["nodes"])}
        return cls(**{**values, "profile": Profile.model_validate_json(json.dumps(values["profile"]))})


def sbatch_script(submission: Submission, lead_seconds: float) -> str:
    """The batch script.

    Args:
        submission: the run.
        lead_seconds: how long before the job's end the supervisor asks the run to stop, as far as is known now.
    """
    slurm = submission.profile.slurm
    assert slurm is not None
    fewest, most = submission.nodes
    python = shlex.quote(submission.supervisors_python)
    batch = ["-u", "-m", "dstrain.supervise.batch", "--run-dir", str(submission.run_dir), "--code", submission.code]
    directives = [
        f"job-name={_job_name(submission)}",
        # no --ntasks-per-node: with it, SLURM grants the fewest nodes of a range only
        f"nodes={fewest}" if fewest == most else f"nodes={fewest}-{most}",
        *asked_of_slurm(slurm),
        "requeue" if requeues(submission) else "no-requeue",
        f"signal=B:USR1@{warning_seconds(slurm.time, lead_seconds)}",
        f"export={','.join((*_ALWAYS_EXPORTED, *submission.profile.pass_environment))}",
        "output=/dev/null",
    ]
    if submission.chain is not None:
        directives.append("dependency=singleton")
    lines = ["#!/bin/bash --login", *(f"#SBATCH --{directive}" for directive in directives), ""]
    lines += [
        "# Until the supervisor listens, the warning before the time limit must not end this script.",
        "trap '' USR1",
    ]
    lines += ["set -e", f"exec >>{shlex.quote(str(submission.run_dir / LOG_NAME))} 2>&1"]
    lines += [f"cd -- {shlex.quote(str(submission.folder))}"]
    lines += [f"module load {shlex.quote(module)}" for module in submission.profile.modules]
    if submission.profile.venv is not None:
        lines.append(f"source {shlex.quote(str(Path(submission.profile.venv).expanduser() / 'bin/activate'))}")
    lines += [
        "",
        "# Starts the nodes with srun, stays with them, and requeues this job once a checkpoint is committed.",
    ]
    return "\n".join([*lines, f"exec {python} {shlex.join(batch)}", ""])


def asked_of_slurm(slurm: Slurm) -> list[str]:
    """What a profile asks of SLURM, as long options without their dashes."""
    named = [f"{key.replace('_', '-')}={value}" for key in _DIRECTIVES if (value := getattr(slurm, key)) is not None]
    return [*named, *(option.removeprefix("--") for option in slurm.extra)]


def _job_name(submission: Submission) -> str:
    """Jobs of a chain wait for others of their name, so theirs is that of the run's folder."""
    if submission.chain is None:
        return submission.name
    return f"{submission.name}-{zlib.crc32(str(submission.run_dir).encode()):08x}"


def requeues(submission: Submission) -> bool:
    """Whether the job puts itself back into the queue."""
    assert submission.profile.slurm is not None
    return submission.profile.slurm.requeue and submission.chain is None


def warning_seconds(time: str | None, lead_seconds: float) -> int:
    """When SLURM sends its warning: a little after the supervisor's own clock has asked the run to stop.

    It sends it up to a minute early. On top of the lead that would cost short jobs all of their time, so it is taken
    off; the warning is there for preemption, and for limits that are changed later.
    """
    limit = None if time is None else parse_slurm_limit(time)
    lead = 0.0 if limit is None else min(lead_seconds, limit / 3)
    return max(1, round(lead) - _SENT_EARLY_SECONDS)
