"""What the measured speeds of ranks and of pairs of nodes say: how fast, and which of them are far slower. Pure."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from dstrain.preflight.checks import Finding

BENCH = "dstrain.doctor.bench:run_rank"  # what ranks call that measure themselves
BENCH_PLAN = "bench.json"  # what they are told
GEMM_SHARE = 0.8  # of the median; what is below is an outlier
LINK_SHARE = 0.6  # of what the fastest quarter makes: one slow node of three slows two pairs of three
_GEMM, _LINKS = "GEMM", "all-reduce"


@dataclass(frozen=True)
class RankSpeed:
    """One rank, as `dstrain.doctor.bench` wrote it down. Speeds are bytes per second."""

    rank: int
    node: int
    host: str
    device: str
    flops_per_second: float
    pairs: Mapping[int, float]  # other node → speed; only of the first rank of a node
    within_node: float | None = None

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Self:
        """Back from the file."""
        return cls(**{**content, "pairs": {int(node): speed for node, speed in content["pairs"].items()}})


def links(ranks: Sequence[RankSpeed]) -> dict[tuple[int, int], float]:
    """The speed of each pair of nodes that was measured: what the slower side saw."""
    found: dict[tuple[int, int], float] = {}
    for rank in ranks:
        for other, speed in rank.pairs.items():
            pair = (min(rank.node, other), max(rank.node, other))
            found[pair] = min(speed, found.get(pair, speed))
    return dict(sorted(found.items()))


def judge_speeds(ranks: Sequence[RankSpeed], precision: str, with_devices: Collection[int] = ()) -> list[Finding]:
    """Outliers by name, or the range of what was measured; `with_devices`: the nodes that have GPUs, by number."""
    names = {rank.node: rank.host for rank in ranks}
    blind = {rank.host for rank in ranks if rank.device == "cpu" and rank.node in with_devices}
    words = "has devices that torch does not see: its ranks would run on the CPU"
    remedy = "compare `nvidia-smi` with the CUDA version of torch there, and CUDA_VISIBLE_DEVICES"
    return [
        *(Finding("devices", "error", host, words, remedy) for host in sorted(blind)),
        *_gemm(ranks, precision),
        *_links(links(ranks), names, ranks),
    ]


def _gemm(ranks: Sequence[RankSpeed], precision: str) -> list[Finding]:
    speeds = [rank.flops_per_second for rank in ranks]
    usual = median(speeds)
    slow = [rank for rank in ranks if rank.flops_per_second < GEMM_SHARE * usual]
    remedy = "look for other programs, a power or heat limit (`nvidia-smi -q`), or leave the node out"
    if slow:
        return [
            Finding(
                _GEMM,
                "warning",
                rank.host,
                f"rank {rank.rank} makes {_flops(rank.flops_per_second)} {precision}, the others {_flops(usual)}",
                remedy,
            )
            for rank in slow
        ]
    devices = ", ".join(sorted({rank.device for rank in ranks}))
    return [Finding(_GEMM, "ok", None, f"{_range(speeds, _flops)} {precision} of each rank ({devices})")]


def _links(
    speeds: Mapping[tuple[int, int], float], names: Mapping[int, str], ranks: Sequence[RankSpeed]
) -> list[Finding]:
    if not speeds:
        inside = [rank.within_node for rank in ranks if rank.within_node is not None]
        words = f"{_bytes(min(inside))} among the ranks of the node" if inside else "a single rank: nothing to measure"
        return [Finding(_LINKS, "ok", None, words)]
    usual = sorted(speeds.values())[math.ceil(0.75 * len(speeds)) - 1]
    slow = {pair for pair, speed in speeds.items() if speed < LINK_SHARE * usual}
    remedy = "look at its cable, its switch port and its MTU, and at network.interface"
    findings = []
    for node, name in names.items():
        own = {pair for pair in speeds if node in pair}
        if len(own) > 1 and own <= slow:
            slowest = _range([speeds[pair] for pair in own], _bytes)
            words = (
                f"all of its {len(own)} links are slow: {slowest}, a quarter of all pairs make {_bytes(usual)} or more"
            )
            findings.append(Finding(_LINKS, "warning", name, words, remedy))
            slow -= own
    for first, second in sorted(slow):
        words = f"the link to {names[second]} makes {_bytes(speeds[first, second])}, others {_bytes(usual)}"
        findings.append(Finding(_LINKS, "warning", names[first], words, remedy))
    if findings:
        return findings
    words = f"{_range(list(speeds.values()), _bytes)} between any two of {len(names)} nodes ({len(speeds)} pairs)"
    return [Finding(_LINKS, "ok", None, words)]


def _range(values: Sequence[float], shown: Any) -> str:
    least, most = shown(min(values)), shown(max(values))
    return least if least == most else f"{least} to {most}"


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.0f} GFLOP/s"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s" if value >= 1e9 else f"{value / 1e6:.0f} MB/s"
