"""What a rank of `dstrain doctor` does in place of training: a matrix product, and an all-reduce with each other node.

It is started as training is, by agents over the profile's transport, so the process group, its devices and its network
are those of the training. Each rank writes `bench/rank-00000.json`.

All pairs of nodes are measured, in rounds in which every node talks to one other (the circle method of round-robin
tournaments); of many nodes only as many rounds as there is time for.
"""

import json
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstrain.base.environment import RankVariables
from dstrain.doctor.speeds import BENCH_PLAN
from dstrain.rundir.attempt_files import write_json
from dstrain.runtime.peak import measured_flops

MOST_ROUNDS = 15
TIMEOUT = timedelta(seconds=40)
_SMALL_BYTES, _LARGE_BYTES = 1 << 20, {"cpu": 32 << 20, "cuda": 256 << 20}
_SECONDS_FOR_A_PAIR = 1.5
_GEMM = {"cpu": 1024, "cuda": 8192}


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Every pair of nodes once, in rounds in which each node is in at most one pair."""
    around = list(range(nodes + nodes % 2))  # an odd number gets one to sit out with
    found = []
    for _ in range(len(around) - 1):
        half = len(around) // 2
        pairs = zip(around[:half], reversed(around[half:]), strict=True)
        found.append(sorted((min(pair), max(pair)) for pair in pairs if max(pair) < nodes))
        around = [around[0], around[-1], *around[1:-1]]
    return found


def run_rank(run_dir: Path, attempt: int) -> str:
    """Measure this rank; a collective call. Returns "done"."""
    variables = RankVariables.require()
    rank, world = variables.rank, variables.world_size
    per_node, local_rank = variables.local_world_size, variables.local_rank
    plan = json.loads((run_dir / BENCH_PLAN).read_text())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    found: dict[str, Any] = {"rank": rank, "node": rank // per_node, "host": socket.gethostname()}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[plan["precision"]]
    dist.barrier()  # all at once, as in training: cores and power are shared
    found["flops_per_second"] = measured_flops(device, dtype, size=_GEMM[device.type], seconds=plan["gemm_seconds"])

    found["pairs"] = {}
    leaders = list(range(0, world, per_node))  # one rank of each node
    for pairs in rounds(len(leaders))[:MOST_ROUNDS]:
        for pair in pairs:
            members = [leaders[node] for node in pair]
            group = dist.new_group(members)  # which all ranks have to make
            if rank in members:
                speed = _all_reduce(group, members, device)
                other = pair[1] if rank == members[0] else pair[0]
                found["pairs"][str(other)] = speed
        dist.barrier()
    if len(leaders) == 1 and world > 1:
        found["within_node"] = _all_reduce(dist.group.WORLD, range(world), device)
    write_json(run_dir / "bench" / f"rank-{rank:05d}.json", found)
    dist.barrier()
    dist.destroy_process_group()
    return "done"


def _all_reduce(group: Any, members: Sequence[int], device: torch.device) -> float:
    """Bytes per second over the slowest link of a ring: 2 (n - 1) / n of the tensor pass it."""
    size = _SMALL_BYTES
    _timed(group, size, device)  # connects
    slowest = torch.tensor([_timed(group, size, device)], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)  # all have to choose the same size
    large = _LARGE_BYTES[device.type]
    repeats = 2
    if float(slowest) * repeats * large / size < _SECONDS_FOR_A_PAIR:
        size = large
    best = min(_timed(group, size, device) for _ in range(repeats))
    return 2 * (len(members) - 1) / len(members) * size / best


def _timed(group: Any, size: int, device: torch.device) -> float:
    tensor = torch.zeros(size // 4, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
