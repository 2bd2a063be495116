"""`dstrain doctor`: is it safe to start, there, now? The long form of what is checked before every start.

profile ─► lint ─┐
nodes ─► probe ─► checks ─┼─► findings ─► a table, or JSON; exit code 0 safe, 2 not
ranks ─► bench ─► speeds ─┘        started as training is, in a folder of its own on the run's disk
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.base import environment
from dstrain.base.devices import count_devices
from dstrain.diagnose.causes import explain
from dstrain.diagnose.verdict import first_failure
from dstrain.doctor.speeds import BENCH, BENCH_PLAN, RankSpeed, judge_speeds, links
from dstrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from dstrain.observe.progress import RunProgress
from dstrain.plan import batch_plan, recipe_checkpoint_bytes
from dstrain.preflight.ask import Answer
from dstrain.preflight.checks import Finding, Level
from dstrain.preflight.lint import Durations, lint
from dstrain.preflight.preflight import examine
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.run_folder import attempt_folder
from dstrain.rundir.timings import Timings
from dstrain.supervise.attempt import run_attempt
from dstrain.transport.cluster import hosts_of, make_cluster, stop_timeout_seconds
from dstrain.transport.command import Job
from dstrain.transport.profile import Profile, load_profile, parse_nodes
from dstrain.transport.stops import Stops
from dstrain.transport.transport import TRANSPORTS, Queue

GEMM_SECONDS = 0.5
MEASURING_SECONDS = 60.0  # then the ranks have not found each other, and are killed
ALLOCATION_MINUTES = 5
_MARKS: dict[Level, str] = {"ok": "ok", "warning": "warning", "error": "ERROR"}


@dataclass(frozen=True)
class Patient:
    """What is examined: the run as it would be started, as far as that is possible."""

    title: str
    job: Job
    recipe: Recipe | None
    profile: Profile | None
    findings: list[Finding]  # so far: what cannot be as it was asked for


@dataclass(frozen=True)
class Result:
    """What was found."""

    patient: Patient
    findings: list[Finding]
    answers: list[Answer]
    speeds: list[RankSpeed]
    seconds: float

    @property
    def is_safe(self) -> bool:
        """Whether there is no error. Warnings do not count."""
        return all(finding.level != "error" for finding in self.findings)


def doctor_command(args: argparse.Namespace) -> int:
    """`dstrain doctor [RECIPE] [key=value …] [--on PROFILE] [--nodes N] [--quick] [--json]`.

    Returns:
        0 if it is safe to start, else 2.

    Raises:
        UserError: recipe, profile or host file cannot be read, or SLURM grants no nodes.
    """
    profile = None if args.on is None else load_profile(args.on)
    queue = None if profile is None else TRANSPORTS[profile.transport].queue
    if profile is not None and queue is not None and queue.current_job() is None:
        return _inside_allocation(args, profile, queue)
    patient = admit(args, profile)
    result = examined(patient, is_quick=args.quick)
    print(json.dumps(as_json(result), indent=1) if args.json else as_text(result))
    return EXIT_DONE if result.is_safe else EXIT_USER_ERROR


def admit(args: argparse.Namespace, profile: Profile | None) -> Patient:
    """The run as it would be started. What stands against that becomes a finding, and does not end the examination."""
    overrides = args.overrides if profile is None else profile.with_overrides(args.overrides)
    recipe = None if args.recipe is None else load_recipe(args.recipe, overrides, check_files=False).recipe
    name = "doctor" if recipe is None else recipe.name
    run_dir = Path(args.run_dir or (Path("runs") if recipe is None else Path("runs") / name)).expanduser().resolve()
    ranks = args.procs_per_node or (profile.procs_per_node if profile else None)
    findings: list[Finding] = []
    if profile is None:
        job = Job(name, run_dir, ranks or count_devices() or 1)
    else:
        nodes = profile.node_range if args.nodes is None else parse_nodes(args.nodes)
        hosts, ranks = _hosts(profile, recipe, nodes, ranks, findings)
        timeout = stop_timeout_seconds(profile, Timings.read(run_dir))
        cluster = make_cluster(profile, hosts)
        job = Job(name, run_dir, ranks, shutdown_timeout_seconds=timeout, cluster=cluster)
    if recipe is not None and not findings:
        try:
            findings.append(Finding("batch", "ok", None, str(batch_plan(recipe, job.world))))
        except UserError as error:
            findings.append(_batch_error(error))
    where = "this machine" if profile is None else args.on
    count = 1 if job.cluster is None else len(job.cluster.hosts)
    title = f"{args.recipe or 'no recipe'} on {where}: {_counted(count, 'node')} × {_counted(job.ranks, 'rank')}"
    return Patient(title, job, recipe, profile, findings)


def _hosts(
    profile: Profile, recipe: Recipe | None, nodes: tuple[int, int], ranks: int | None, findings: list[Finding]
) -> tuple[list[str], int]:
    """The nodes, and how many ranks each gets; as many nodes as there may be, if those are too many for the recipe."""
    transport = TRANSPORTS[profile.transport]
    hosts = transport.hosts(profile)
    if recipe is not None:
        try:
            return hosts_of(profile, recipe, nodes, ranks)
        except UserError as error:
            findings.append(_batch_error(error))
    used = hosts[: nodes[1]]
    slots = [host.slots for host in used if host.slots is not None]
    ranks = ranks or transport.ranks_of_node() or min(slots, default=None)
    if ranks is None:
        raise UserError("procs_per_node is missing; say how many ranks a node gets")
    return [host.name for host in used], ranks


def _batch_error(error: UserError) -> Finding:
    words, _, remedy = str(error).rpartition("; ")
    return Finding("batch", "error", None, words or remedy, remedy or "change the numbers")


def examined(patient: Patient, *, is_quick: bool) -> Result:
    """Everything that there is to find."""
    began, job, profile, recipe = time.monotonic(), patient.job, patient.profile, patient.recipe
    with _borrowed(job.run_dir):
        found, answers = examine(job, recipe, is_long=not is_quick)
        findings = [*patient.findings, *found]
        if profile is not None:
            findings += _launch_findings(profile, job, recipe, answers)
        speeds: list[RankSpeed] = []
        if not is_quick:
            if any(finding.level == "error" for finding in found):
                words = "not measured: the errors of the nodes come first"
                findings.append(Finding("speed", "warning", None, words, "correct them, and ask again"))
            else:
                speeds, more = measure(job, recipe, _with_devices(answers))
                findings += more
    return Result(patient, findings, answers, speeds, time.monotonic() - began)


def _with_devices(answers: Sequence[Answer]) -> Set[int]:
    return {node for node, answer in enumerate(answers) if answer.facts is not None and answer.facts.visible_devices}


def _launch_findings(profile: Profile, job: Job, recipe: Recipe | None, answers: Sequence[Answer]) -> list[Finding]:
    durations, kill_wait = Durations.of(Timings.read(job.run_dir)), None
    if durations is None and recipe is not None:
        speeds = [answer.facts.bytes_per_second for answer in answers if answer.facts and answer.facts.bytes_per_second]
        size = recipe_checkpoint_bytes(recipe)
        if speeds:
            durations = Durations(0.0, size / sum(speeds), are_measured=False)
    if (queue := TRANSPORTS[profile.transport].queue) is not None:
        with contextlib.suppress(UserError):
            kill_wait = queue.kill_wait_seconds()
    return lint(profile, environment.variables(), job.shutdown_timeout_seconds, durations, kill_wait)


# ---------------------------------------------------------------- measuring


def measure(job: Job, recipe: Recipe | None, with_devices: Set[int]) -> tuple[list[RankSpeed], list[Finding]]:
    """Start ranks as training is started, that measure themselves and the links between them."""
    precision = "fp32" if recipe is None else recipe.train.precision
    folder = job.run_dir / f".doctor-{uuid.uuid4().hex[:8]}"
    bench = replace(job, name="doctor", run_dir=folder, entry=BENCH, shutdown_timeout_seconds=5, max_restarts=0)
    stops = Stops()
    patience = threading.Timer(MEASURING_SECONDS, setattr, (stops, "interrupts", 2))
    patience.start()
    try:
        write_json(folder / BENCH_PLAN, {"precision": precision, "gemm_seconds": GEMM_SECONDS})
        with Path(os.devnull).open("w") as nowhere, RunProgress(nowhere, "doctor") as progress, stops.listening():
            ended = run_attempt(bench, 1, stops, progress)
        if ended.result == "done":
            files = sorted((folder / "bench").glob("rank-*.json"))
            speeds = [RankSpeed.of_json(json.loads(file.read_text())) for file in files]
            return speeds, judge_speeds(speeds, precision, with_devices)
        if stops.signal is not None:
            raise KeyboardInterrupt
        if ended.failures and ended.result != "killed":  # by the timer
            first, _ = first_failure(ended.failures)
            cause, remedy = explain(first, ended.new_oom_kills)
            who = "the launcher" if first.rank is None else f"rank {first.rank}"
            lines = first.message.strip() or "\n".join(first.log_tail)
            last = lines.splitlines()[-1] if lines else "it left no words"
            return [], [Finding("speed", "error", first.host, f"{who} failed: {cause} ({last})", remedy)]
        started = len(list((attempt_folder(folder, 1) / "ranks").glob("*.json")))
        words = f"{started} of {job.world} ranks have started and did not find each other in {MEASURING_SECONDS:.0f} s"
        remedy = "look for a firewall between the nodes, and name a network.interface that connects them"
        return [], [Finding("speed", "error", None, words, remedy)]
    finally:
        patience.cancel()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _borrowed(run_dir: Path) -> Iterator[None]:
    """Have the run's folder there; of what was made for that nothing stays."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be made: {error.strerror}; name another --run-dir") from None
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _inside_allocation(args: argparse.Namespace, profile: Profile, queue: Queue) -> int:
    """The same command on nodes that the queue grants for a few minutes."""
    nodes = profile.node_range if args.nodes is None else parse_nodes(args.nodes)
    words = [*([] if args.recipe is None else [args.recipe]), *args.overrides]
    named = (("--on", args.on), ("--nodes", args.nodes), ("--procs-per-node", args.procs_per_node))
    for option, value in (*named, ("--run-dir", args.run_dir)):
        words += [] if value is None else [option, str(value)]
    words += ["--quick"] * args.quick + ["--json"] * args.json
    command = [sys.executable, "-m", "dstrain", "doctor", *words]
    code = queue.run_inside(profile, nodes, ALLOCATION_MINUTES, command)
    if code not in (EXIT_DONE, EXIT_USER_ERROR):
        raise UserError("the scheduler granted no nodes, or took them away; its words are above")
    return code


# ---------------------------------------------------------------- showing


def as_text(result: Result) -> str:
    """A table, the remedy of each problem below it, and the sum of it."""
    width = max(len(finding.check) for finding in result.findings)
    lines = [f"dstrain doctor: {result.patient.title}"]
    for finding in result.findings:
        where = "" if finding.host is None else f"{finding.host}: "
        lines.append(f"  {_MARKS[finding.level]:7}  {finding.check:{width}}  {where}{finding.text}")
        if finding.remedy:
            lines.append(f"  {'':7}  {'':{width}}  → {finding.remedy}")
    counts = {level: sum(finding.level == level for finding in result.findings) for level in _MARKS}
    shown = [_counted(count, level) for level, count in counts.items() if count and level != "ok"]
    words = "safe to start" if result.is_safe else "NOT safe to start"
    lines.append(f"{words}{' (' + ', '.join(reversed(shown)) + ')' if shown else ''}; took {result.seconds:.1f} s")
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count != 1]}"


def as_json(result: Result) -> dict[str, Any]:
    """The same for programs, with all facts."""
    names = {speed.node: speed.host for speed in result.speeds}
    return {
        "safe": result.is_safe,
        "title": result.patient.title,
        "seconds": round(result.seconds, 2),
        "findings": [finding.as_json() for finding in result.findings],
        "nodes": {answer.host: None if answer.facts is None else asdict(answer.facts) for answer in result.answers},
        "gemm_flops_per_second": {str(speed.rank): speed.flops_per_second for speed in result.speeds},
        "all_reduce_bytes_per_second": [
            {"nodes": [names[first], names[second]], "speed": speed}
            for (first, second), speed in links(result.speeds).items()
        ],
    }
