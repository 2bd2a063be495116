"""Pictures of a report as SVG text: curves, confusion matrix, reliability."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from dstrain.tasks.calibration import CalibrationBin

Curve = Sequence[tuple[float, float]]
LARGEST_MATRIX = 40  # labels; a wider one is a grey square


def curves(by_run: Mapping[str, Curve], name: str, *, log: bool = False) -> str:
    """One line for each run over its steps."""
    figure, axes = _figure(6.0, 3.2)
    for run, curve in by_run.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, label=run, linewidth=1.2, marker="." if len(steps) < 30 else None)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    if log:
        axes.set_yscale("log")
    if len(by_run) > 1:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _svg(figure)


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The confusion matrix, each row as shares of its true label, with the counts written where there is room."""
    import numpy as np

    matrix = np.array(counts, dtype=float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(9.0, 1.6 + 0.34 * len(labels))
    figure, axes = _figure(side + 0.8, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    short = [label if len(label) <= 24 else label[:23] + "…" for label in labels]
    size = 8 if len(labels) <= 20 else 5
    axes.set_xticks(range(len(labels)), short, rotation=90, fontsize=size)
    axes.set_yticks(range(len(labels)), short, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= 20:
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                if count:
                    colour = "white" if shares[row, column] > 0.6 else "black"
                    axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)
    return _svg(figure)


def reliability(bins: Sequence[CalibrationBin]) -> str:
    """Accuracy over confidence; on the diagonal a probability means what it says."""
    figure, axes = _figure(3.6, 3.2)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    sizes = [12 + 120 * each.predictions / max(other.predictions for other in bins) for each in bins]
    axes.scatter([each.confidence for each in bins], [each.accuracy for each in bins], s=sizes, clip_on=False, zorder=3)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and looks for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    """From `<svg` on, the same for the same figure. Text stays text: browsers have the fonts of all scripts."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dstrain", "axes.unicode_minus": False}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
