"""What a launch profile promises and cannot keep: stops that do not arrive, time that is too short, lost variables.

Pure: over the profile, the shell that it is used from, and how long steps and saves have taken. docs/operations.md
explains each finding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Self

from dstrain.preflight.checks import Finding, Problems
from dstrain.rundir.timings import Timings, p99
from dstrain.transport.profile import Profile
from dstrain.transport.transport import TRANSPORTS

CHECK = "launch"
# Variables that libraries of a rank act on. Set in a shell, they are easily believed to reach the ranks.
_EFFECTIVE = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "HF_", "OMP_", "MKL_", "LD_LIBRARY_PATH", "PYTHONPATH")


@dataclass(frozen=True)
class Durations:
    """Seconds. `are_measured`: of this run; else the save is estimated, and nothing is known of steps."""

    step: float
    save: float
    are_measured: bool

    @classmethod
    def of(cls, timings: Timings) -> Self | None:
        """What earlier attempts of a run have taken; None before there are any."""
        if timings.step_seconds and timings.save_seconds:
            return cls(p99(timings.step_seconds), p99(timings.save_seconds), are_measured=True)
        return None


def lint(
    profile: Profile,
    environment: Mapping[str, str],
    shutdown_timeout_seconds: int,
    durations: Durations | None,
    kill_wait_seconds: int | None = None,
) -> list[Finding]:
    """Every problem of a profile, or a line that says that there is none.

    Args:
        profile: what the user wrote.
        environment: of the shell that `dstrain run` is to be called from.
        shutdown_timeout_seconds: from the word to stop to the killing of ranks.
        durations: of a step and a save, where they are known.
        kill_wait_seconds: from a scheduler's word to stop to its killing, where it is known.
    """
    problems = [
        *_container_problems(profile),
        *_time_problems(profile, shutdown_timeout_seconds, durations, kill_wait_seconds),
        *_variable_problems(profile, environment),
    ]
    if problems:
        return [Finding(CHECK, *problem) for problem in problems]
    known = "not measured yet" if durations is None else f"about {durations.step + durations.save:.1f} s"
    words = f"ranks have {shutdown_timeout_seconds} s for their last step and save ({known})"
    return [Finding(CHECK, "ok", None, words)]


def _container_problems(profile: Profile) -> Problems:
    if not profile.container:
        return
    program, words = PurePath(profile.container[0]).name, profile.container[1:]
    if program in ("bash", "sh") and "-c" in words:
        remedy = 'write the program itself, or add `exec "$0" "$@"` to what it runs'
        if not any("$@" in word for word in words):
            yield "error", None, f"container: {program} -c does not run the words that come after it", remedy
        elif not any("exec" in word for word in words):
            yield (
                "warning",
                None,
                f"container: {program} -c stays between the agent and its signals",
                "begin it with exec",
            )
    if program in ("docker", "podman"):
        short = [word for word in words if word.startswith("-") and not word.startswith("--")]
        if "--interactive" not in words and not any("i" in word for word in short):
            remedy = "add -i: the word to stop, and the sign that the supervisor lives, come that way"
            yield "error", None, f"container: {program} does not pass on standard input", remedy
        if not any(word.startswith(("--env", "-e")) for word in words) and _variables(profile):
            names = ", ".join(_variables(profile))
            yield "error", None, f"container: {program} does not pass on {names}", "add --env NAME for each of them"
    cleaning = {"-e", "--cleanenv", "-C", "--containall"}
    if program in ("apptainer", "singularity") and (cut := cleaning & set(words)) and _variables(profile):
        names = ", ".join(_variables(profile))
        yield "error", None, f"container: {program} {min(cut)} does not pass on {names}", f"delete {min(cut)}"
    configured = any(word in ("-c", "--conf") or word.startswith("--conf=") for word in words)
    if program == "enroot" and not configured and not any(word.startswith(("--env", "-e")) for word in words):
        names = ", ".join(_variables(profile))
        remedy = "add --env NAME for each of them, or --conf FILE with `environ() { env; }` in it"
        yield "error", None, f"container: enroot does not pass on {names}", remedy
    if program == "sudo" and not {"-E", "--preserve-env"} & set(words):
        yield "error", None, "container: sudo passes on no variable", "add -E, or run as the right user from the start"


def _variables(profile: Profile) -> list[str]:
    """The names that a rank needs; the first marks its processes as this run's."""
    return ["DSTRAIN_ATTEMPT", *profile.environment, *profile.pass_environment]


def _time_problems(
    profile: Profile, timeout: int, durations: Durations | None, kill_wait_seconds: int | None
) -> Problems:
    if durations is None:
        return
    needed = durations.step + durations.save
    source = "took" if durations.are_measured else "will take about"
    if timeout < needed:
        words = f"ranks are killed {timeout} s after the word to stop, and a step and a save {source} {needed:.0f} s"
        yield "error", None, words, f"set shutdown_timeout_seconds to at least {2 * needed:.0f}"
    transport = TRANSPORTS[profile.transport]
    for level, words, remedy in transport.objections(profile, needed, source, kill_wait_seconds):
        yield level, None, words, remedy


def _variable_problems(profile: Profile, environment: Mapping[str, str]) -> Problems:
    for name, value in profile.environment.items():
        if "$" in value or "`" in value or value.startswith("~"):
            remedy = "write the whole value, or set it in your shell and name it in pass_environment"
            yield "warning", None, f"environment.{name}={value!r} is taken literally: no shell reads it", remedy
        elif len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            yield "warning", None, f"environment.{name}={value!r} has quotes inside its value", "quote once, for YAML"
    known = {*profile.environment, *profile.pass_environment}
    lost = [name for name in sorted(environment) if name.startswith(_EFFECTIVE) and name not in known]
    if lost:
        words = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} set in this shell and will not reach the ranks"
        yield "warning", None, words, "name what they need in environment or pass_environment"
