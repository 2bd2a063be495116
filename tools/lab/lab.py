"""Rehearse multi-node launching on one Debian machine, as root: a SLURM cluster or hosts that talk ssh.

    python tools/lab/lab.py install
    python tools/lab/lab.py slurm up && eval "$(python tools/lab/lab.py slurm env)" && srun -N2 hostname
    python tools/lab/lab.py ssh up && python tools/lab/lab.py ssh on ctl pdsh -R ssh -w 'node[1-3]' hostname

Nothing outside of --run-dir is changed, and `down` leaves nothing. What to try, and what to expect: docs/lab.md.
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

from lab_host import LabError
from lab_packages import install
from slurm_lab import SlurmLab
from ssh_lab import SshLab


def main(arguments: list[str] | None = None) -> int:
    """Run one command; exit code 0, or 2 with the reason on standard error."""
    options = parser().parse_args(arguments)
    try:
        if options.kind == "install":
            print(install())
        elif options.kind == "slurm":
            _slurm(SlurmLab(options.run_dir), options)
        else:
            _ssh(SshLab(options.run_dir), options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _slurm(lab: SlurmLab, options: argparse.Namespace) -> None:
    if options.action in ("up", "on") and (reason := lab.cannot_run()):
        raise LabError(reason)
    match options.action:
        case "up":
            lab.up(options.nodes)
            print(lab.run("sinfo").stdout, end="")
        case "down":
            lab.down()
        case "status":
            _print_table({name: "up" if up else "down" for name, up in lab.status().items()})
        case "env":
            if not lab.status():
                raise LabError(f"there is no lab in {lab.folder}; start one with `up`")
            print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in lab.env.items()))
        case "on":
            command = lab.entering(options.host, options.command)
            os.execvpe(command[0], command, {**os.environ, **lab.env})
        case "reset":
            lab.reset()
        case "kill-node":
            lab.kill_node(options.host)
        case "revive-node":
            lab.revive_node(options.host)


def _ssh(lab: SshLab, options: argparse.Namespace) -> None:
    if options.action in ("up", "on") and (reason := lab.cannot_run()):
        raise LabError(reason)
    match options.action:
        case "up":
            lab.up(options.nodes)
            _print_table(lab.status())
        case "down":
            lab.down()
        case "status":
            _print_table(lab.status())
        case "on":
            command = lab.entering(options.host, options.command)
            os.execvp(command[0], command)
        case "reset":
            lab.reset()
        case "trust":
            lab.trust()
        case "cut" | "heal" | "kill" | "boot" | "rekey":
            getattr(lab, options.action)(options.host)


def _print_table(states: dict[str, str]) -> None:
    print("\n".join(f"{name:8} {state}" for name, state in states.items()) or "no lab")


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = argparse.ArgumentParser(prog="lab.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="install|slurm|ssh")
    kinds.add_parser("install", help="install Debian's packages, if any is missing; none is started")
    _add_kind(
        kinds.add_parser("slurm", help="a SLURM cluster on loopback: ctl, node1, node2 …"),
        "slurm",
        alone={
            "env": "print the shell's `export` lines for sbatch, srun …",
            "reset": "cancel all jobs, end what they left, power on what is off",
        },
        per_host={
            "kill-node": "power a host off, the jobs' processes on it included",
            "revive-node": "power it on again and wait until it serves",
        },
    )
    _add_kind(
        kinds.add_parser("ssh", help="hosts with a network of their own: ctl, node1, node2 …"),
        "ssh",
        alone={
            "trust": "make the present host keys known to all hosts",
            "reset": "boot every host afresh, plugged in and trusted",
        },
        per_host={
            "cut": "pull a host's network cable",
            "heal": "plug it in again",
            "kill": "power a host off",
            "boot": "power it on again",
            "rekey": "give a host a new host key that no other knows",
        },
    )
    return top


def _add_kind(parser: argparse.ArgumentParser, kind: str, alone: dict[str, str], per_host: dict[str, str]) -> None:
    place = argparse.ArgumentParser(add_help=False)
    default = Path(tempfile.gettempdir()) / f"dstrain-lab-{kind}"
    place.add_argument("--run-dir", type=Path, default=default, help="folder for all of its state (%(default)s)")
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", parents=[place], help="start what does not run yet")
    up.add_argument("--nodes", type=int, choices=range(1, 33), metavar="1-32", default=3, help="of a new lab (3)")
    alone = {"down": "end everything and delete --run-dir", "status": "which hosts are up"} | alone
    for action, text in alone.items():
        actions.add_parser(action, parents=[place], help=text)
    on = actions.add_parser("on", parents=[place], help="run a command on a host")
    on.add_argument("host")
    on.add_argument("command", nargs=argparse.REMAINDER)
    for action, text in per_host.items():
        actions.add_parser(action, parents=[place], help=text).add_argument("host")


if __name__ == "__main__":
    sys.exit(main())
