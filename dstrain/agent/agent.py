"""The elastic agent of one node: starts its ranks, ends all when one fails, and writes down which ones failed and how.

    python -m dstrain.agent.agent --run-dir DIR --attempt N --ranks R --shutdown-timeout SECONDS --parent-pid PID
    python -m dstrain.agent.agent … --nodes 2 --node-rank 0 --rendezvous node1:29400 --control

This is torchrun's agent with torchrun's meaning of everything. Restarts are not its business (max_restarts=0): whether
one makes sense is decided outside, from what is written here. SIGTERM (also SIGINT and SIGUSR1) is passed on to the
ranks, which take it for "save and leave"; after the timeout comes SIGKILL. Exit code: 0 all ranks ended well or were
asked to leave, 1 a rank failed, 2 this node does not have the code that was to run.
"""

import argparse
import atexit
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dstrain.base.code_digest import code_digest
from dstrain.base.devices import has_devices
from dstrain.base.environment import set_defaults
from dstrain.base.processes import die_with_parent, end_marked, kernel_oom_victims, oom_kills
from dstrain.diagnose.flight_recorder import recorder_environment
from dstrain.diagnose.watch import watch
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.run_folder import TRAINING, attempt_folder
from dstrain.transport.control import SILENCE_SECONDS, Clock, listen, take_standard_input

JOIN_TIMEOUT_SECONDS = 300  # Python and torch from a cold shared disk, on every node


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until its ranks have ended."""
    parser = argparse.ArgumentParser(prog="python -m dstrain.agent.agent", description="one node's elastic agent")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="processes on this node")
    parser.add_argument("--shutdown-timeout", type=int, required=True, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--parent-pid", type=int, help="end at once when that process, the parent, dies")
    parser.add_argument("--entry", default=TRAINING, help="what each rank runs, see dstrain.rank")
    parser.add_argument("--nodes", type=int, default=1, help="how many there are (default: %(default)s)")
    parser.add_argument("--node-rank", type=int, default=0, help="the number of this one, from 0 (the default)")
    parser.add_argument("--rendezvous", help="host:port of node 0; needed for several nodes")
    parser.add_argument(
        "--control", action="store_true", help="be led through standard input, see dstrain.transport.control"
    )
    parser.add_argument(
        "--silence", type=float, default=SILENCE_SECONDS, help="seconds without a word there (default: %(default)s)"
    )
    parser.add_argument("--code", help="end at once if this is not the digest of the package here")
    arguments = parser.parse_args(argv)
    if arguments.parent_pid is not None:
        die_with_parent(arguments.parent_pid)
    folder = attempt_folder(arguments.run_dir, arguments.attempt)
    report_file = folder / "agents" / f"node-{arguments.node_rank:05d}.json"
    report: dict[str, Any] = {"node": arguments.node_rank, "host": socket.gethostname(), "signal": None, "failures": []}
    began, clock = time.monotonic(), Clock()
    if arguments.control:
        lost = partial(_end_everything, folder, report_file, report)
        listen(take_standard_input(), lost, clock, arguments.silence)
    if arguments.code is not None and arguments.code != (found := code_digest()):
        words = f"the package on {report['host']} has digest {found}, the run was started with {arguments.code}"
        report["user_error"] = f"{words}; install the same version on every node, or start the run anew with this one"
        write_json(report_file, report)
        return EXIT_USER_ERROR

    rank_arguments = ["-u", "-m", "dstrain.rank", "--parent-pid", str(os.getpid()), "--entry", arguments.entry]
    rank_arguments += ["--run-dir", str(arguments.run_dir), "--attempt", str(arguments.attempt)]
    if arguments.nodes == 1:
        config = one_node(arguments.ranks, arguments.shutdown_timeout)
    else:
        nodes = (arguments.nodes, arguments.node_rank, arguments.rendezvous)
        config = several_nodes(*nodes, arguments.ranks, arguments.shutdown_timeout)
    if has_devices():
        record_collectives(folder)
    first = arguments.node_rank * arguments.ranks
    here = range(first, first + arguments.ranks)
    watching = watch(arguments.run_dir, arguments.attempt, here, arguments.node_rank, arguments.nodes)
    code, oom_kills_before = EXIT_DONE, oom_kills()
    try:
        elastic_launch(config, sys.executable)(*rank_arguments)
    except ChildFailedError as error:
        report["failures"] = failures(error)
        code = EXIT_FAILURE
    except SignalException as stop:
        report["signal"] = stop.sigval.name
    except Exception as error:  # the rendezvous: without a report, the other nodes would wait for this one in vain
        traceback.print_exc()
        report["agent_error"] = {"type": type(error).__name__, "message": str(error)}
        code = EXIT_FAILURE
    if watching is not None:
        watching.end()
    report |= {"time_unix": time.time(), "clock_ahead_seconds": clock.ahead_seconds}
    if (victims := kernel_oom_victims(began)) is not None:
        report["oom_victims"] = sorted(victims)
    if oom_kills_before is not None and (oom_kills_after := oom_kills()) is not None:
        report["new_oom_kills"] = oom_kills_after - oom_kills_before
    write_json(report_file, report)
    return code


def record_collectives(folder: Path) -> None:
    """Have the ranks keep their last collectives. What the user has set already stays."""
    pipes = Path(tempfile.mkdtemp(prefix="dstrain-nccl-"))
    atexit.register(shutil.rmtree, pipes, ignore_errors=True)
    (folder / "nccl").mkdir(parents=True, exist_ok=True)
    set_defaults(recorder_environment(folder, pipes))


def _end_everything(folder: Path, report_file: Path, report: dict[str, Any], reason: str) -> None:
    """Without a supervisor: leave a report, and no process of this attempt on this machine."""
    report = {**report, "signal": reason, "time_unix": time.time(), "lost_supervisor": True}
    with contextlib.suppress(OSError):
        write_json(report_file, {**report, "is_ending": True})
    end_marked(folder)
    with contextlib.suppress(OSError):  # another attempt may begin now, see dstrain.supervise.fence
        write_json(report_file, report)
    os._exit(EXIT_FAILURE)


def one_node(ranks: int, shutdown_timeout_seconds: int) -> LaunchConfig:
    """The launch of `ranks` processes on this machine alone; the store takes a free port of the loopback device."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",  # else the host's name has to resolve
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # ranks open their own logs
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
        shutdown_timeout=shutdown_timeout_seconds,
    )


def several_nodes(
    nodes: int, node_rank: int, rendezvous: str, ranks: int, shutdown_timeout_seconds: int
) -> LaunchConfig:
    """This node's part of a launch on `nodes` of them; node 0 hosts the store at `rendezvous`.

    The static rendezvous: who is who was decided outside, and neither the hosts' names nor the order in which agents
    arrive matter. Several agents on one machine work as well.
    """
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=rendezvous,
        rdzv_backend="static",
        rdzv_endpoint=rendezvous,
        rdzv_configs={"rank": node_rank, "timeout": JOIN_TIMEOUT_SECONDS},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
        shutdown_timeout=shutdown_timeout_seconds,
    )


def failures(error: ChildFailedError) -> list[dict[str, Any]]:
    """Every failed rank, in the order in which the agent saw them end (whole seconds)."""
    found = []
    for rank, failure in sorted(error.failures.items(), key=lambda item: (item[1].timestamp, item[0])):
        name = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else None
        seen = {"exit_code": failure.exitcode, "signal": name, "time_unix": failure.timestamp}
        found.append({"rank": rank, "pid": failure.pid, **seen})
    return found


if __name__ == "__main__":
    sys.exit(main())
