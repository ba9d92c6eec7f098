"""The pictures, as inline SVG: transparent, their ink the page's text colour, so that they suit light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bsam_fused.report import said
from bsam_fused.report.benefit import Outcome
from bsam_fused.report.results import Report
from bsam_fused.report.rows import Row
from bsam_fused.report.sweep import Point

INK = "#123457"  # stands for the page's text colour until the SVG is written
METHODS = {"SGD": "#8b95a5", "SAM": "#3d8bfd", "BSAM": "#e8743b"}
COLOURS = {
    "alone": "#8b95a5",
    "loops": "#8b95a5",
    "foreach": "#3d8bfd",
    "pytorch_optimizer": "#a06cd5",
    "torch": "#d9a520",
    "triton": "#e0559a",
    "cpp": "#e8743b",
    "cuda": "#e8743b",
}
PASSES, GAPS = "#8b95a5", "#d64550"
PHASES = {"ascend": "#3d8bfd", "descend": "#a06cd5", "step": "#12a594", "zero_grad": "#d9a520"}
ROW = 0.27
"""Height of a bar and its gap, in inches."""
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


def _tall(report: Report) -> float:
    """Return a height in inches at which each row has room."""
    return max(3.4, 1.3 + ROW * len(report.rows))


def _svg(height: Callable[[Report], float] = _tall) -> Callable[[Plot], Callable[[Report], Markup]]:
    """Return a decorator: the function then draws its plot and gives it as an <svg> element, so many inches high."""

    def drawing(plot: Plot) -> Callable[[Report], Markup]:
        @wraps(plot)
        def draw(report: Report) -> Markup:
            with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.__name__}):
                figure = Figure(figsize=(5, height(report)), layout="constrained")
                plot(figure.add_subplot(), report)
                file = io.StringIO()
                unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
                figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
            svg = file.getvalue()
            svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
            title = f'<svg role="img" aria-label="{(plot.__doc__ or "").splitlines()[0]}"'
            return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("<svg", title, 1))

        return draw

    return drawing


@_svg(lambda _: 2.4)
def accuracy(axes: Axes, report: Report) -> None:
    """Test accuracy by optimizer: a bar is the mean, a dot a run."""
    if report.benefit:
        draw_accuracy(axes, report.benefit.outcomes)


def draw_accuracy(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw a bar an optimizer, the mean over its runs beside it, and a dot a run."""
    for found in outcomes:
        name, runs = found.optimizer, found.accuracies_percent
        axes.barh(name, found.accuracy_percent, color=METHODS[name], height=0.6)
        axes.plot(runs, [name] * len(runs), "o", color=INK, markersize=4, alpha=0.7)
        axes.text(max(runs) + 2, name, said.accuracy(found), va="center", fontsize=9)  # type: ignore[arg-type]
    axes.set(xlabel="test images named rightly, %")
    _horizontal(axes)
    axes.set_xlim(0, 130)
    axes.set_xticks(range(0, 101, 20))


def draw_cost(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw a bar an implementation: the passes of its step, and beside them the optimizer's own time."""
    names = [row.name for row in rows]
    passes = [row.passes_ms for row in rows]
    axes.barh(names, passes, color=PASSES, height=0.6, label="forward and backward passes")
    own = [row.optimizer_ms for row in rows]
    bars = axes.barh(names, own, left=passes, color=METHODS["BSAM"], height=0.6, label="the optimizer's own work")
    over = [f"{said.own_overhead(row)}{' of the passes' if row.optimizer_is_seen else ''}" for row in rows]
    axes.bar_label(bars, over, padding=3, fontsize=9)
    axes.set(xlabel="time of a training step, ms")
    _horizontal(axes)
    axes.margins(x=0.55)  # room for words


@_svg()
def steps(axes: Axes, report: Report) -> None:
    """Where a step's time goes: a bar an implementation; passes, phases and gaps stacked."""
    names = [row.name for row in report.rows]
    left = [0.0] * len(names)
    parts = [("passes", PASSES, [row.passes_ms for row in report.rows])]
    parts += [(call, colour, [row.phases_ms.get(call, 0.0) for row in report.rows]) for call, colour in PHASES.items()]
    parts.append(("gaps", GAPS, [row.gaps_ms for row in report.rows]))
    bars = None
    for label, colour, values in parts:
        if any(values):
            bars = axes.barh(names, values, left=left, color=colour, label=label, height=0.72)
            left = [a + b for a, b in zip(left, values, strict=True)]
    if bars is not None:
        axes.bar_label(bars, [said.own_overhead(row) for row in report.rows], padding=3, fontsize=9)
    axes.set(xlabel="time of a step, ms")
    axes.figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    _horizontal(axes)


@_svg()
def overhead(axes: Axes, report: Report) -> None:
    """The optimizer's own time of a step against the number of parameters, by implementation."""
    _lines(axes, report.points, lambda point: point.optimizer_ms)
    axes.set(ylabel="optimizer time of a step, ms")


@_svg()
def roofline(axes: Axes, report: Report) -> None:
    """Bandwidth reached against the bytes that a step must move; the roof is a copy's bandwidth."""
    _lines(axes, report.points, lambda point: point.gb_per_s)
    if report.copy_gb_per_s is not None:
        axes.axhline(report.copy_gb_per_s, color=INK, linewidth=1.5, linestyle="--", label="copy")
        axes.annotate(
            f"copy: {report.copy_gb_per_s:.1f} GB/s",
            (0.02, report.copy_gb_per_s),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set(ylabel="bytes to move over time, GB/s")


@_svg()
def memory(axes: Axes, report: Report) -> None:
    """Peak memory beside parameters, gradients and the base optimizer's, by implementation."""
    largest = max((point.elements for point in report.points), default=0)
    points = [point for point in report.points if point.elements == largest]
    names = [f"{point.algorithm}, {point.implementation}" for point in points]
    bars = axes.barh(names, [point.extra_mb for point in points], color=_colours(points), height=0.72)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
    axes.set(xlabel=f"extra memory at {largest:,} parameters, MB")
    _horizontal(axes)


@_svg()
def losses(axes: Axes, report: Report) -> None:
    """Training loss in float64, the mean of each epoch: broad where it is fused, dashed where not."""
    curves = report.learning.curves if report.learning else []
    for curve in curves:
        method, _, kind = curve.name.partition(", ")
        look: dict[str, Any] = {"linewidth": 4, "alpha": 0.45} if kind == "fused" else {"linestyle": "--"}
        epochs = range(1, len(curve.epoch_losses) + 1)
        axes.plot(epochs, curve.epoch_losses, color=METHODS[method], label=curve.name, marker=".", **look)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    _ticks(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=INK, alpha=0.15)
    axes.legend(frameon=False)


def _lines(axes: Axes, points: Sequence[Point], value: Callable[[Point], float]) -> None:
    """Draw a line an implementation; of several algorithms the last, which costs most, in full and others dotted."""
    axes.set(xlabel="parameters", xscale="log", yscale="log")
    _ticks(axes.xaxis, EngFormatter(sep=""))
    _ticks(axes.yaxis)
    named: set[str] = set()
    algorithms = list(dict.fromkeys(point.algorithm for point in points))
    for algorithm, implementation in dict.fromkeys((point.algorithm, point.implementation) for point in points):
        own = [it for it in points if (it.algorithm, it.implementation) == (algorithm, implementation)]
        axes.plot(
            [point.elements for point in own],
            [value(point) for point in own],
            color=COLOURS[implementation],
            label=implementation if implementation not in named else None,
            linestyle="-" if algorithm == algorithms[-1] else ":",
            marker="o",
            markersize=4,
            linewidth=1.8,
        )
        named.add(implementation)
    axes.grid(color=INK, alpha=0.15)
    if points:
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)


def _ticks(axis: Axis, formatter: Any = None) -> None:
    """Put figures at 1, 2, 5 of every decade, so that an axis of less than one has some, too."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter or FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _colours(points: Sequence[Point]) -> list[str]:
    return [COLOURS[point.implementation] for point in points]


def _horizontal(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines["left"].set_visible(False)
