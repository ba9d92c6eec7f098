"""The plots, as inline SVG: transparent, their ink the page's text colour, so that they suit light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bsam_fused.report.results import Report

INK = "#123457"  # stands for the page's text colour until the SVG is written
COLOURS = {"SGD": "#8b95a5", "SAM": "#3d8bfd", "BSAM": "#e8743b"}
PASSES, OPTIMIZER = "#8b95a5", "#12a594"
STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.fonttype": "none",
}

Plot = Callable[[Axes, Report], None]


def _svg(plot: Plot) -> Callable[[Report], Markup]:
    """Return a function that draws ``plot`` and gives it as an <svg> element."""

    @wraps(plot)
    def draw(report: Report) -> Markup:
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.__name__}):
            figure = Figure(figsize=(5, 3.2), layout="constrained")
            plot(figure.add_subplot(), report)
            file = io.StringIO()
            unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg))

    return draw


@_svg
def losses(axes: Axes, report: Report) -> None:
    """Plot each implementation's training loss: broad where it is fused, dashed where not."""
    for row in report.measurements:
        epochs = range(1, len(row.epoch_losses) + 1)
        fused = row.kind == "fused"
        look: dict[str, Any] = {"linewidth": 4, "alpha": 0.45} if fused else {"linewidth": 1.5, "linestyle": "--"}
        axes.plot(epochs, row.epoch_losses, color=COLOURS[row.method], label=row.name, marker=".", **look)
    axes.set(xlabel="epoch", ylabel="training loss, mean over the epoch", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=INK, alpha=0.15)
    axes.legend(frameon=False)


@_svg
def steps(axes: Axes, report: Report) -> None:
    """Plot where a step's time goes: a bar an implementation, its passes and its optimizer stacked."""
    names = [row.name for row in report.measurements]
    passes = [row.passes_ms for row in report.measurements]
    own = [row.optimizer_ms for row in report.measurements]
    axes.barh(names, passes, color=PASSES, label="passes")
    bars = axes.barh(names, own, left=passes, color=OPTIMIZER, label="optimizer")
    axes.bar_label(bars, [f"+{row.overhead_percent:.1f} %" for row in report.measurements], padding=4)
    axes.set(xlabel="time of a step, ms (median)")
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False)
    _horizontal(axes)


@_svg
def optimizers(axes: Axes, report: Report) -> None:
    """Plot the optimizer's own time, a bar an implementation."""
    names = [row.name for row in report.measurements]
    colours = [COLOURS[row.method] for row in report.measurements]
    bars = axes.barh(names, [row.optimizer_ms for row in report.measurements], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set(xlabel="optimizer time of a step, ms (median)")
    _horizontal(axes)


def _horizontal(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
