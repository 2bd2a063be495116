"""What a debug run tells at its end: shapes, memory by part, where the time went, the largest operators. Pure."""

import re
from collections.abc import Mapping
from typing import Any

from dstrain.base.phases import RankPhase

ORDERS, REPORT = "debug.json", "debug-report.json"  # in the folder of a debug run
_PARTS = ("weights", "optimizer", "gradients and buffers", "activations")
_PHASES = {
    RankPhase.DATA: "wait for data",
    RankPhase.AGREE: "agree with other ranks",
    RankPhase.FORWARD: "forward",
    RankPhase.BACKWARD: "backward",
    RankPhase.STEP: "optimizer step",
    RankPhase.BETWEEN_STEPS: "between steps",
}
_BESIDE = (RankPhase.LOAD, RankPhase.EVALUATE, "save")


def report_text(report: Mapping[str, Any]) -> str:
    """The report of `dstrain.train.debugged` for people."""
    sections = {
        f"Shapes of a micro-batch ({report['batch']})": _shapes(report),
        "Memory of rank 0 in MB": _memory(report),
        f"Where the time went ({report['steps']} steps on {report['device']}), seconds": _times(report),
        "Operators of the last step, by their own time": _operators(report),
    }
    lines = []
    for heading, body in sections.items():
        if body:
            lines += ["", heading, *(f"  {line}" for line in body)]
    return "\n".join(lines)


def _shapes(report: Mapping[str, Any]) -> list[str]:
    inputs, outputs = report["inputs"], collapsed(report["outputs"])
    if not inputs:
        return ["no forward pass was made"]
    width = max(map(len, (*inputs, *outputs)))
    return [
        *(f"in   {name:{width}}  {shape}" for name, shape in inputs.items()),
        *(f"out  {name:{width}}  {shape}" for name, shape in outputs.items()),
    ]


def collapsed(outputs: Mapping[str, str]) -> dict[str, str]:
    """Layers that differ in their number alone as one line, as `layer.0-11`."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, shape in outputs.items():
        number = re.search(r"\.(\d+)(?=\.|$)", name)
        pattern = name if number is None else f"{name[: number.start()]}.*{name[number.end() :]}"
        groups.setdefault((pattern, shape), []).append((name, -1 if number is None else int(number[1])))
    found = {}
    for (pattern, shape), members in groups.items():
        if len(members) == 1:
            found[members[0][0]] = shape
        else:
            numbers = sorted(number for _, number in members)
            span = f"{numbers[0]}-{numbers[-1]}" if numbers[-1] - numbers[0] == len(numbers) - 1 else str(numbers)
            found[pattern.replace("*", span, 1)] = shape
    return found


def _memory(report: Mapping[str, Any]) -> list[str]:
    measured, planned = report["memory_bytes"], report["planned_bytes"]
    width = max(map(len, _PARTS))
    lines = [f"{'':{width}}  {'planned':>10}  {'measured':>10}"]
    for part in _PARTS:
        found = f"{measured[part] / 1e6:10.1f}" if part in measured else f"{'not reached':>10}"
        lines.append(f"{part:{width}}  {planned[part] / 1e6:10.1f}  {found}")
    peak, of_what = report["peak_bytes"] / 1e6, report["peak_is_of"]
    return [*lines, f"{'peak':{width}}  {planned['total'] / 1e6:10.1f}  {peak:10.1f}  (measured: of {of_what})"]


def _times(report: Mapping[str, Any]) -> list[str]:
    first, later, count = report["first_step_seconds"], report["later_seconds"], report["timed_later_steps"]
    width = max(map(len, _PHASES.values()))
    names = [name for name in _PHASES if name in first]
    if count:
        whole = sum(later[name] for name in names) or 1.0
        lines = [f"{'':{width}}  {'first step':>10}  {'each later':>10}  {'share':>6}"]
        for name in names:
            figures = f"{first[name]:10.3f}  {later[name] / count:10.3f}  {later[name] / whole:6.1%}"
            lines.append(f"{_PHASES[name]:{width}}  {figures}")
    else:
        lines = [f"{_PHASES[name]:{width}}  {first[name]:10.3f}" for name in names]
    beside = {name: first.get(name, 0.0) + later.get(name, 0.0) for name in _BESIDE}
    return [*lines, *(f"{name:{width}}  {seconds:10.3f}" for name, seconds in beside.items() if seconds)]


def _operators(report: Mapping[str, Any]) -> list[str]:
    operators = report["operators"]
    width = max((len(operator["name"]) for operator in operators), default=0)
    return [
        f"{one['name']:{width}}  {one['calls']:>7,} calls  {one['seconds']:8.3f} s  {one['share']:6.1%}"
        for one in operators
    ]
