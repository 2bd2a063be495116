"""`transport: slurm`: a batch job that supervises its nodes from the first of them, and starts them with srun.

The script is short on purpose: it says what SLURM has to grant, and becomes `dstrain.supervise.batch`. Nothing else of
the package starts SLURM's commands.
"""

import re
import shlex
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

from dstrain.base.durations import parse_slurm_left, parse_slurm_limit
from dstrain.base.environment import for_child, slurm_job, slurm_nodes
from dstrain.base.processes import run, run_in_terminal
from dstrain.base.section import PositiveInt, Section
from dstrain.errors import UserError
from dstrain.recipe.messages import given
from dstrain.recipe.source import Node, Problem
from dstrain.transport.channel import Channel
from dstrain.transport.command import Cluster
from dstrain.transport.hostfile import Host
from dstrain.transport.node_script import entry_command
from dstrain.transport.profile import Profile
from dstrain.transport.submission import Submission, WorkerArray
from dstrain.transport.transport import JobState, Objection, Queue, Transport

# Stands in a `#SBATCH` line, which has no quoting that is the same in all versions of SLURM.
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\"'\\#$`]+$")]

_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
# Options that `dstrain` sets itself; given twice, which one wins would depend on SLURM.
_OWN_OPTIONS: tuple[str, ...] = (
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--signal",
    "--export",
    "--output",
    "--error",
    "--chdir",
)
_OWN_OPTIONS += ("--job-name", "--requeue", "--no-requeue", "--open-mode", "--dependency", "--array", "--wrap")
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
_ARRAY_LEAD_SECONDS = 120  # before the time limit: the worker's run saves and stops
_REQUEUED = ("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT")


class Slurm(Section):
    """What `sbatch` is told; each key is the option of that name, and null leaves it to the cluster."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Word | None = None
    gres: Word | None = None
    cpus_per_task: PositiveInt | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    mail_user: Word | None = None
    mail_type: Word | None = None
    reservation: Word | None = None
    requeue: bool = True
    extra: tuple[Word, ...] = ()


class SlurmQueue(Queue):
    """SLURM's queue, through its commands."""

    script_name = "slurm.sbatch"
    log_name = "slurm.log"

    def script(self, submission: Submission, lead_seconds: float) -> str:
        """See `Queue`."""
        return sbatch_script(submission, lead_seconds)

    def array_script(self, array: WorkerArray) -> str:
        """An array of jobs."""
        settings = slurm_section(array.profile)
        directives = [
            f"job-name={array.name}-sweep",
            f"array=0-{array.count - 1}",
            "nodes=1",
            *asked_of_slurm(settings),
            "requeue" if settings.requeue else "no-requeue",
            f"signal=B:USR1@{_ARRAY_LEAD_SECONDS}",
        ]
        log = shlex.quote(str(array.folder / array.log_stem))
        python = "python" if array.python is None else shlex.quote(array.python)
        main = [
            "# The warning before the time limit, and preemption:"
            " the worker's run stops at a checkpoint, exit code 75.",
            f'{python} {shlex.join(array.arguments)} "$SLURM_ARRAY_TASK_ID" & worker=$!',
            "trap 'kill -TERM $worker' USR1 TERM",
            "wait $worker; code=$?",
            "while kill -0 $worker 2>/dev/null; do wait $worker; code=$?; done",
        ]
        if settings.requeue:
            main.append('[ $code != 75 ] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"')
        main.append("exit $code")
        before = [f'exec >>{log}"$SLURM_ARRAY_TASK_ID.log" 2>&1']
        set_up = _set_up(array.profile, array.working_folder, array.profile.environment)
        return _batch_script(array.profile, directives, [*before, *set_up], main)

    def requeues(self, submission: Submission) -> bool:
        """Not so in a chain, whose next job goes on."""
        return slurm_section(submission.profile).requeue and submission.chain is None

    def is_reachable(self) -> bool:
        """Whether SLURM's commands are here."""
        return shutil.which("squeue") is not None

    def submit(self, script: Path) -> str:
        """`sbatch`: the job's number."""
        # SBATCH_… variables would silently win over what the script, and so the profile, says.
        return _ask(["sbatch", "--parsable", str(script)], for_child(without="SBATCH_")).partition(";")[0]

    def state(self, job: str) -> JobState | None:
        """See `Queue`."""
        try:
            word = _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip()
        except UserError as error:
            if "Invalid job id" in str(error):
                return None
            raise
        if not word:
            return None
        return {"PENDING": JobState.PENDING, **dict.fromkeys(_REQUEUED, JobState.REQUEUED)}.get(word, JobState.RUNNING)

    def cancel(self, job: str) -> None:
        """See `Queue`."""
        _ask(["scancel", job])

    def ask_to_stop(self, job: str) -> None:
        """SIGTERM for the batch step alone, which is the supervisor."""
        _ask(["scancel", "--batch", "--signal=TERM", job])

    def requeue(self, job: str) -> None:
        """Put the job back into the queue; it is ended at once for that."""
        _ask(["scontrol", "requeue", job])

    def kill_wait_seconds(self) -> int | None:
        """KillWait of the configuration."""
        for line in _ask(["scontrol", "show", "config"]).splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "KillWait" and value.split()[0].isdecimal():
                return int(value.split()[0])
        return None

    def run_inside(self, profile: Profile, nodes: tuple[int, int], minutes: int, command: Sequence[str]) -> int:
        """Run a command here while SLURM holds the nodes that `salloc` is asked for; its exit code."""
        options = [f"--{option}" for option in asked_of_slurm(slurm_section(profile))]
        options += [f"--nodes={nodes[0]}-{nodes[1]}", f"--time={minutes}", "--job-name=dstrain-doctor"]
        try:
            return run_in_terminal(["salloc", "--quiet", *options, *command], for_child(without="SALLOC_"))
        except FileNotFoundError:
            raise UserError("salloc is not on this machine; run this where SLURM's commands are") from None

    def current_job(self) -> str | None:
        """SLURM_JOB_ID."""
        return slurm_job()

    def seconds_left(self, job: str) -> float | None:
        """See `Queue`."""
        return parse_slurm_left(_ask(["squeue", "--noheader", f"--jobs={job}", "--format=%L"]))


class SlurmTransport(Transport):
    """srun inside an allocation."""

    section_name = "slurm"
    section = Slurm
    queue = SlurmQueue()

    def hosts(self, profile: Profile) -> Sequence[Host]:
        """The nodes of the job that this process runs in, in SLURM's order."""
        names = _ask(["scontrol", "show", "hostnames", slurm_nodes()]).split()
        return tuple(Host(name, None) for name in names)

    def hosts_place(self, profile: Profile) -> str:
        """The job."""
        return "the job"

    def channels(self, cluster: Cluster) -> tuple[Channel, ...]:
        """One job step over all hosts."""
        assert isinstance(cluster.section, Slurm)
        return slurm_channels(cluster.hosts, cluster.section.cpus_per_task)

    def section_problems(self, section: Node) -> Iterator[Problem]:
        """Times, and options that are set already."""
        yield from _section_problems(section)

    def time_limit_seconds(self, profile: Profile) -> int | None:
        """`slurm.time`."""
        time = slurm_section(profile).time
        return None if time is None else parse_slurm_limit(time)

    def objections(
        self, profile: Profile, needed_seconds: float, source: str, kill_wait_seconds: int | None
    ) -> Iterator[Objection]:
        """A time limit or KillWait that is too short."""
        limit = self.time_limit_seconds(profile)
        if limit is not None and limit / 3 < needed_seconds:
            kept = f"a third of slurm.time ({limit / 3:.0f} s) is kept for the end"
            yield "error", f"{kept}, and a step and a save {source} {needed_seconds:.0f} s", "ask for more time"
        if kill_wait_seconds is not None and kill_wait_seconds < needed_seconds:
            kills = f"SLURM kills {kill_wait_seconds} s after `scancel` or preemption (KillWait)"
            words = f"{kills}, and a step and a save {source} {needed_seconds:.0f} s"
            yield "warning", words, "stop it with `scancel --batch --signal=USR1 JOB`; set GraceTime for preemption"


TRANSPORT = SlurmTransport()


def slurm_section(profile: Profile) -> Slurm:
    """The profile's section."""
    assert isinstance(profile.section, Slurm)
    return profile.section


def slurm_channels(hosts: Sequence[str], cpus_per_task: int | None) -> tuple[Channel, ...]:
    """One job step over all hosts, which get the numbers that they have in `hosts`."""
    count = str(len(hosts))
    srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}"]
    srun += ["--distribution=block", "--export=ALL", "--mpi=none", "--cpu-bind=none", "--label"]
    # The supervisor decides when the others are ended: each is to say first what happened to it.
    srun += ["--kill-on-bad-exit=0", "--wait=0"]
    if cpus_per_task is not None:
        srun.append(f"--cpus-per-task={cpus_per_task}")  # srun does not take it from the job since SLURM 22.05
    return (Channel(tuple(range(len(hosts))), (*srun, *entry_command(None))),)


# ---------------------------------------------------------------- batch scripts


def sbatch_script(submission: Submission, lead_seconds: float) -> str:
    """The batch script of a run. Pure; see `Queue.script`."""
    profile, slurm = submission.profile, slurm_section(submission.profile)
    fewest, most = submission.nodes
    batch = ["-u", "-m", "dstrain.supervise.batch", "--run-dir", str(submission.run_dir), "--code", submission.code]
    directives = [
        f"job-name={_job_name(submission)}",
        # no --ntasks-per-node: with it, SLURM grants the fewest nodes of a range only
        f"nodes={fewest}" if fewest == most else f"nodes={fewest}-{most}",
        *asked_of_slurm(slurm),
        "requeue" if SlurmTransport.queue.requeues(submission) else "no-requeue",
        f"signal=B:USR1@{warning_seconds(slurm.time, lead_seconds)}",
    ]
    chained = ["dependency=singleton"] if submission.chain is not None else []
    before = [
        "# Until the supervisor listens, the warning before the time limit must not end this script.",
        "trap '' USR1",
        "set -e",
        f"exec >>{shlex.quote(str(submission.run_dir / SlurmQueue.log_name))} 2>&1",
        *_set_up(profile, submission.folder),
    ]
    main = [
        "# Starts the nodes with srun, stays with them, and requeues this job once a checkpoint is committed.",
        f"exec {shlex.quote(submission.supervisors_python)} {shlex.join(batch)}",
    ]
    return _batch_script(profile, directives, before, main, chained)


def _batch_script(
    profile: Profile, directives: Sequence[str], before: Sequence[str], main: Sequence[str], after: Sequence[str] = ()
) -> str:
    """A script for sbatch: what is asked of SLURM (`after` comes last), what sets up the shell, and what it is for."""
    exported = f"export={','.join((*_ALWAYS_EXPORTED, *profile.pass_environment))}"
    asked = [f"#SBATCH --{directive}" for directive in (*directives, exported, "output=/dev/null", *after)]
    return "\n".join(["#!/bin/bash --login", *asked, "", *before, "", *main, ""])


def _set_up(profile: Profile, folder: Path, environment: Mapping[str, str] | None = None) -> list[str]:
    lines = [f"cd -- {shlex.quote(str(folder))}"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    lines += [f"module load {shlex.quote(module)}" for module in profile.modules]
    if profile.venv is not None:
        lines.append(f"source {shlex.quote(str(Path(profile.venv).expanduser() / 'bin/activate'))}")
    return lines


def asked_of_slurm(slurm: Slurm) -> list[str]:
    """What a profile asks of SLURM, as long options without their dashes."""
    named = [f"{key.replace('_', '-')}={value}" for key in _DIRECTIVES if (value := getattr(slurm, key)) is not None]
    return [*named, *(option.removeprefix("--") for option in slurm.extra)]


def _job_name(submission: Submission) -> str:
    """Jobs of a chain wait for others of their name, so theirs is that of the run's folder."""
    if submission.chain is None:
        return submission.name
    return f"{submission.name}-{zlib.crc32(str(submission.run_dir).encode()):08x}"


def warning_seconds(time: str | None, lead_seconds: float) -> int:
    """When SLURM sends its warning: a little after the supervisor's own clock has asked the run to stop.

    It sends it up to a minute early. On top of the lead that would cost short jobs all of their time, so it is taken
    off; the warning is there for preemption, and for limits that are changed later.
    """
    limit = None if time is None else parse_slurm_limit(time)
    lead = 0.0 if limit is None else min(lead_seconds, limit / 3)
    return max(1, round(lead) - _SENT_EARLY_SECONDS)


# ---------------------------------------------------------------- the profile's section, SLURM's commands


def _section_problems(section: Node) -> Iterator[Problem]:
    if not isinstance(section.value, dict):
        return
    time = section.value.get("time")
    if time is not None and (written := time.written) is not None and not _TIME.fullmatch(written):
        yield Problem(time.place, f"slurm.time={given(time)} is not a time of SLURM; write 24:00:00 or 2-00:00:00")
    extra = section.value.get("extra")
    for node in extra.value if extra is not None and isinstance(extra.value, list) else ():
        if not isinstance(node.value, str):
            continue
        option = node.value.partition("=")[0]
        if not option.startswith("--"):
            yield Problem(node.place, f"slurm.extra has {given(node)}; write whole long options, as in --mem=0")
        elif option in _OWN_OPTIONS:
            yield Problem(node.place, f"slurm.extra has {option}, which is set already; delete it")
        else:
            key = option.removeprefix("--").replace("-", "_")
            if key in Slurm.model_fields:
                yield Problem(node.place, f"slurm.extra has {option}, which has a key of its own; write slurm.{key}")


def _ask(command: Sequence[str], environment: Mapping[str, str] | None = None, tries: int = 5) -> str:
    """Its output. The controller may be restarting, so what is refused for that is asked again."""
    for attempt in range(tries):
        try:
            answer = run(command, environment=environment)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not on this machine; run this where SLURM's commands are") from None
        if answer.exit_code == 0:
            return answer.output.strip()
        words = answer.errors.strip() or f"{command[0]} ended with code {answer.exit_code}"
        if "Unable to contact" not in words and "Socket timed out" not in words:
            break
        time.sleep(2**attempt)
    raise UserError(words)
