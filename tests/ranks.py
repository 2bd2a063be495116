"""Real ranks for tests: one process each, forked from a server that has imported torch and DeepSpeed once.

    results = run_ranks(2, function, argument, …)    # function(rank, world_size, argument, …) in each of two processes

A rank gets the environment that torchrun would give it. Results come back by rank; if any rank raises, the first one's
traceback is raised here.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# One server for the whole session; importing these takes seconds, forking it milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "accelerate",
        "transformers.models.bert.modeling_bert",
        "transformers.models.roberta.modeling_roberta",
        "transformers.models.modernbert.modeling_modernbert",
        "dstrain.train.main",
        "dstrain.tasks.masked_lm",
    ]
)
TIMEOUT_SECONDS = 300.0


class RankError(AssertionError):
    """A rank raised, or died without a word."""


def start_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> "Ranks":
    """Start the ranks and return at once; `Ranks.results` waits for them."""
    return Ranks(world_size, function, arguments)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function(rank, world_size, *arguments)` on real ranks and return what each returned."""
    return start_ranks(world_size, function, *arguments).results()


class Ranks:
    """Running ranks: their processes, to be killed by a test that wants to, and their results."""

    def __init__(self, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        port = free_port()
        self.processes = []
        self._receivers: list[Connection] = []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank, args=(rank, world_size, port, sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            self.processes.append(process)
            self._receivers.append(receiver)

    def results(self) -> list[Any]:
        """Wait for all ranks. Raises RankError for the first that failed, and ends the others."""
        results: dict[int, Any] = {}
        try:
            while len(results) < len(self._receivers):
                pending = {r: rank for rank, r in enumerate(self._receivers) if rank not in results}
                ready = wait(list(pending), timeout=TIMEOUT_SECONDS)
                if not ready:
                    raise RankError(f"ranks {sorted(pending.values())} did not finish in {TIMEOUT_SECONDS:.0f} s")
                for receiver in ready:
                    rank = pending[receiver]  # type: ignore[index]
                    try:
                        error, value = receiver.recv()  # type: ignore[union-attr]
                    except EOFError:
                        self.processes[rank].join(10)
                        raise RankError(f"rank {rank} died, exit code {self.processes[rank].exitcode}") from None
                    if error:
                        raise RankError(f"rank {rank}:\n{error}")
                    results[rank] = value
        finally:
            self.stop()
        return [results[rank] for rank in sorted(results)]

    def stop(self) -> None:
        """End every rank that still runs."""
        for process in self.processes:
            process.join(5 if process.exitcode is None and not self._failed() else 0)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _failed(self) -> bool:
        return any(process.exitcode not in (None, 0) for process in self.processes)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        sender.send((None, function(rank, world_size, *arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown may wait for threads of a process group whose other end is gone.
    os._exit(0)
