"""Ask the nodes of a cluster for their facts, all at once and the way that ranks get there.

Same transport, shell, folder, modules, container and Python: what the probe finds is what the ranks will find.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dstrain.base.processes import run
from dstrain.preflight.probe import Facts, Questions, heard
from dstrain.transport.channel import Channel
from dstrain.transport.command import Cluster
from dstrain.transport.node_script import python_script, user_environment
from dstrain.transport.transport import TRANSPORTS

TIMEOUT_SECONDS = 90.0


@dataclass(frozen=True)
class Answer:
    """What one node said: its facts, or why there are none."""

    host: str
    facts: Facts | None
    exit_code: int | None  # None: it has not ended in time, or could not be started
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
    channels = TRANSPORTS[cluster.transport].probes(replace(cluster, hosts=hosts))
    with ThreadPoolExecutor(max_workers=64) as pool:
        tasks = [pool.submit(_ask, hosts, channel, script) for channel in channels]
        return [answer for task in tasks for answer in task.result()]


def _ask(hosts: Sequence[str], channel: Channel, script: str) -> list[Answer]:
    """The answers of the nodes behind one channel."""
    asked = time.time()
    code: int | None = None
    output = errors = ""
    try:
        done = run(channel.arguments, given=script.encode(), timeout_seconds=TIMEOUT_SECONDS)
        code, output, errors = done.exit_code, done.output, done.errors
    except TimeoutError:
        errors = f"no answer within {TIMEOUT_SECONDS:.0f} s"
    except OSError as error:
        errors = f"{channel.arguments[0]}: {error.strerror}"
    answered = time.time()
    found = heard(output)
    words = [line.strip() for line in errors.splitlines() if line.strip()]
    last = words[-1] if words else ""
    return [Answer(hosts[node], found.get(node), code, last, asked, answered) for node in channel.nodes]
