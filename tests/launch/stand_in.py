"""A stand-in for the training, and a supervisor of it, as programs: real processes without torch in the ranks.

As a program, `python stand_in.py RUN_DIR RANKS MAX_RESTARTS [profile|movable|on_hang=stop]` supervises ranks that run
`run_rank`, as without a profile, as with a local one, or as a scheduler's job that can be started elsewhere. `run_rank`
reads `script.json` from the run's folder: for each attempt and rank the list of things to do.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from dstrain.base.phases import RankPhase
from dstrain.errors import UserError
from dstrain.observe.progress import RunProgress
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.heartbeat import HeartbeatWriter
from dstrain.rundir.run_folder import exclusive
from dstrain.supervise.supervise import supervise
from dstrain.transport.command import Cluster, Job
from dstrain.transport.node_script import NodeSettings


def run_rank(run_dir: Path, attempt: int) -> str:
    rank = int(os.environ["RANK"])
    stop: list[int] = []
    script = json.loads((run_dir / "script.json").read_text())
    for action in script[str(attempt)].get(str(rank), []):
        name, *words = action.split()
        if name == "step":
            status = {"attempt": attempt, "step": int(words[0]), "total_steps": 10, "phase": "forward"}
            write_json(run_dir / "status" / f"{socket.gethostname()}.json", status | {"time_unix": time.time()})
        elif name == "checkpoint":
            write_json(run_dir / "checkpoints" / f"step-{int(words[0]):010d}" / "manifest.json", {})
        elif name == "print":
            print(" ".join(words))
        elif name == "change-code":
            Path(words[0]).touch(exist_ok=False)
        elif name == "user-error":
            raise UserError(" ".join(words))
        elif name == "error":
            raise RuntimeError(" ".join(words))
        elif name == "kill":
            os.kill(os.getpid(), signal.Signals[words[0]])
        elif name == "beat":
            globals()["heartbeat"] = HeartbeatWriter(int(os.environ["RANK"]))
            globals()["heartbeat"].begin(RankPhase.FORWARD, int(words[0]))
        elif name == "listen":  # until the peer is gone, as a rank in a collective notices it
            with socket.create_server(("127.0.0.1", 0)) as server:
                (run_dir / "port.tmp").write_text(str(server.getsockname()[1]))
                (run_dir / "port.tmp").rename(run_dir / "port")
                peer, _ = server.accept()
                assert peer.recv(1) == b""
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
        elif name == "connect":
            while not (run_dir / "port").exists():
                time.sleep(0.01)
            globals()["peer"] = socket.create_connection(("127.0.0.1", int((run_dir / "port").read_text())))
        elif name == "background":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        elif name == "catch-stop":
            signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
        elif name == "ignore-stop":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif name == "ready":
            (run_dir / f"ready-{rank}").touch()
        elif name == "wait":
            deadline = time.monotonic() + 60
            while not stop and time.monotonic() < deadline:
                time.sleep(0.02)
        elif name == "provoke":
            importlib.import_module("provoked").CAUSES[words[0]](run_dir)
        else:
            raise AssertionError(action)
    return "stopped" if stop else "done"


def show_rank(run_dir: Path, attempt: int) -> str:
    """Write down what this rank was given."""
    seen = {"argv": sys.argv, "cwd": str(Path.cwd()), "environment": dict(os.environ)}
    write_json(run_dir / f"seen-{os.environ['RANK']}.json", seen)
    return "done"


def main() -> int:
    run_dir, ranks, max_restarts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    kind = sys.argv[4] if len(sys.argv) > 4 else None
    job = Job("tiny", run_dir, ranks, max_restarts, shutdown_timeout_seconds=5, entry="stand_in:run_rank")
    if kind == "on_hang=stop":
        job = replace(job, on_hang="stop")
    elif kind is not None:
        settings = NodeSettings(run_dir, sys.executable, {"PYTHONPATH": str(Path(__file__).parent)})
        job = replace(job, cluster=Cluster("local", ("here",), settings), can_be_moved=kind == "movable")
    try:
        with exclusive(run_dir), RunProgress(sys.stderr, "tiny") as progress:
            return supervise(job, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
