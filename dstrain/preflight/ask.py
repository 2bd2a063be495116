"""Ask the nodes of a cluster for their facts, all at once and the way that ranks get there.

Same transport, shell, folder, modules, container and Python: what the probe finds is what the ranks will find.
"""

import contextlib
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dstrain.preflight.probe import Facts, Questions, heard
from dstrain.transport.command import Cluster
from dstrain.transport.node_script import python_script, user_environment
from dstrain.transport.transport import Channel, local_channels, slurm_channels, ssh_channels

TIMEOUT_SECONDS = 90.0
SSH_FAILED = 255


@dataclass(frozen=True)
class Answer:
    """What one node said: its facts, or why there are none."""

    host: str
    facts: Facts | None
    exit_code: int
    last_words: str
    asked_unix: float
    answered_unix: float


@contextmanager
def token(run_dir: Path) -> Iterator[Path]:
    """A file with its own name in it, for a moment: whoever sees it shares the run's folder with this machine."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / f".preflight.{uuid.uuid4().hex}"
    file.write_text(file.name)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def ask(cluster: Cluster, questions: Questions, spare_hosts: Sequence[str] = ()) -> list[Answer]:
    """The answer of every node and spare host of a cluster, in their order."""
    hosts = (*cluster.hosts, *spare_hosts)
    script = python_script(
        cluster.settings,
        user_environment(cluster.settings, len(cluster.hosts)),
        ["-m", "dstrain.preflight.probe", questions.as_word()],
        '"$1" </dev/null',
    )
    if cluster.transport == "ssh":
        channels = ssh_channels(hosts, cluster.lost_after_seconds)
    elif cluster.transport == "slurm":
        channels = slurm_channels(hosts, cluster.cpus_per_task)
    else:
        channels = local_channels()
    with ThreadPoolExecutor(max_workers=64) as pool:
        tasks = [pool.submit(_ask, hosts, channel, script) for channel in channels]
        return [answer for task in tasks for answer in task.result()]


def _ask(hosts: Sequence[str], channel: Channel, script: str) -> list[Answer]:
    """The answers of the nodes behind one channel."""
    asked = time.time()
    try:
        done = subprocess.run(
            channel.arguments, input=script.encode(), capture_output=True, timeout=TIMEOUT_SECONDS, check=False
        )
        code, output, errors = (
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
    except subprocess.TimeoutExpired:
        code, output, errors = SSH_FAILED, "", f"no answer within {TIMEOUT_SECONDS:.0f} s"
    except OSError as error:
        code, output, errors = SSH_FAILED, "", f"{channel.arguments[0]}: {error.strerror}"
    answered = time.time()
    found = heard(output)
    words = [line.strip() for line in errors.splitlines() if line.strip()]
    last = words[-1] if words else ""
    return [Answer(hosts[node], found.get(node), code, last, asked, answered) for node in channel.nodes]
