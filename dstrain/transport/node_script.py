"""What happens on a node, as a script for bash: the same text on every node and over every transport. Pure.

    transport ─► bash -c ENTRY ─► a clean login shell ─► the script, from standard input ─► the elastic agent

The script comes through standard input, so that what it holds is on no disk and no command line. Standard input then
stays open as the line of control between supervisor and agent (see dstrain.transport.control).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dstrain.base.processes import ATTEMPT_MARK
from dstrain.rundir.run_folder import attempt_folder

LOST_AFTER_SECONDS = 60  # a link may be down for that long without costing the run
# Nothing of the environment around it passes through but who the user is and which devices the scheduler granted.
_KEPT = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
ENTRY = (
    'exec env -i HOME="$HOME" USER="$(id -un)" LOGNAME="$(id -un)" SHELL=/bin/bash LANG=C.UTF-8 '
    + "".join(f'${{{name}+{name}="${name}"}} ' for name in _KEPT)
    + 'bash --login -s -- "${1-$SLURM_PROCID}"'
)


@dataclass(frozen=True)
class NodeSettings:
    """What a node's environment is made of."""

    folder: Path  # where ranks work
    python: str  # the interpreter there
    environment: Mapping[str, str] = field(default_factory=dict)
    passed: Mapping[str, str] = field(default_factory=dict)  # values from the submitting shell; never shown or stored
    modules: tuple[str, ...] = ()
    venv: str | None = None
    container: tuple[str, ...] = ()
    interface: str | None = None

    def with_passed(self, passed: Mapping[str, str]) -> "NodeSettings":
        """The same with other values from the submitting shell."""
        return replace(self, passed=passed)


@dataclass(frozen=True)
class AttemptPlan:
    """One attempt on any number of nodes."""

    run_dir: Path  # absolute, the same on every node
    attempt: int
    nodes: int
    ranks_per_node: int
    rendezvous: str  # host:port of the first node, as the others see it
    shutdown_timeout_seconds: int
    entry: str
    code: str | None  # digest of the package's source; None leaves it unchecked
    settings: NodeSettings
    lost_after_seconds: int = LOST_AFTER_SECONDS  # when the supervisor gives up a silent node

    @property
    def silence_seconds(self) -> int:
        """When an agent gives up a silent supervisor: later than that has given up the agent's node."""
        return 2 * self.lost_after_seconds


def entry_command(node: int | None) -> tuple[str, ...]:
    """What a transport starts on a node. None takes the node's number from SLURM."""
    return ("bash", "-c", ENTRY, "dstrain-node", *(() if node is None else (str(node),)))


def node_script(plan: AttemptPlan) -> str:
    """The script that starts a node's agent; its first argument is the node's number."""
    agent = ("-u", "-m", "dstrain.agent.agent", *agent_arguments(plan))
    return python_script(plan.settings, _environment(plan), agent, '--node-rank "$1"')


def python_script(
    settings: NodeSettings, environment: Mapping[str, str], arguments: Sequence[str], more: str = ""
) -> str:
    """A script that becomes the node's Python.

    Args:
        settings: folder, modules, virtual environment, container.
        environment: names, and values as words of the shell.
        arguments: of Python.
        more: words of the shell after them.
    """
    lines = [f"cd -- {shlex.quote(str(settings.folder))}", "unset OLDPWD"]  # which differs with the transport
    lines += [f"module load {shlex.quote(module)} </dev/null" for module in settings.modules]
    if settings.venv is not None:
        lines.append(f"source {shlex.quote(settings.venv + '/bin/activate')} </dev/null")
    lines += [f"export {name}={value}" for name, value in sorted(environment.items())]
    lines.append(f"exec {shlex.join([*settings.container, settings.python, *arguments])} {more}".rstrip())
    # A function, so that a script that arrives only in part does nothing at all.
    body = "\n".join(lines)
    return f'main() {{\nset -e\n{body}\n}}\nmain "$@"\n'


def agent_arguments(plan: AttemptPlan) -> list[str]:
    """The agent's arguments but for the node's number."""
    arguments = ["--run-dir", str(plan.run_dir), "--attempt", str(plan.attempt), "--entry", plan.entry]
    arguments += ["--nodes", str(plan.nodes), "--rendezvous", plan.rendezvous, "--ranks", str(plan.ranks_per_node)]
    arguments += ["--shutdown-timeout", str(plan.shutdown_timeout_seconds), "--control"]
    arguments += ["--silence", str(plan.silence_seconds)]
    return arguments if plan.code is None else [*arguments, "--code", plan.code]


def _environment(plan: AttemptPlan) -> dict[str, str]:
    """Names and shell words; what the user sets wins over what is set here."""
    words = {"OMP_NUM_THREADS": f"$(( $(nproc) > {plan.ranks_per_node} ? $(nproc) / {plan.ranks_per_node} : 1 ))"}
    words |= user_environment(plan.settings, plan.nodes)
    words[ATTEMPT_MARK] = shlex.quote(str(attempt_folder(plan.run_dir, plan.attempt)))
    return words


def user_environment(settings: NodeSettings, nodes: int) -> dict[str, str]:
    """What the profile sets, and which network it means."""
    words = {}
    if settings.interface is not None:
        words = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), shlex.quote(settings.interface))
    elif nodes == 1:
        words["GLOO_SOCKET_IFNAME"] = "lo"  # neither the host's name nor its network matters
    return words | {name: shlex.quote(value) for name, value in {**settings.environment, **settings.passed}.items()}
