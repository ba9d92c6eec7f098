"""The pictures of docs/results.md: each carries a digest of the page that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.evidence.protocol import EVERYWHERE, PLANS
from bench.evidence.results import Found, Length
from bsam_fused.report.figures import INK, STYLE
from bsam_fused.report.training.methods import BASE
from bsam_fused.report.training.tasks import TASKS

COLOURS = dict(zip(EVERYWHERE[1:], ("#3d8bfd", "#e8743b", "#d9a520", "#a06cd5", "#12a594"), strict=True))
DRAWN = {key: "#222222" if value == INK else value for key, value in STYLE.items()}
"""The report's style, its ink black: a page has no colour of its own to lend."""
HOLLOW: dict[Length, bool] = {"epochs": False, "passes": True}


def write(found: Sequence[Found], page: str, folder: Path) -> None:
    """Write all pictures.

    Args:
        found: tasks whose rows are all there.
        page: of which they carry the digest.
        folder: where the page is.
    """
    wide = [it for it in found if len(PLANS[it.task].longer) > len(EVERYWHERE)]
    if not found:
        return
    pictures: list[tuple[str, Callable[[Axes], None], tuple[float, float]]] = [
        ("results_gains.png", lambda axes: _gains(axes, found), (8, 1.2 + 0.55 * len(found))),
        *[("results_prices.png", lambda axes: _prices(axes, wide[0]), (8, 5)) for _ in wide[:1]],
    ]
    for name, draw, size in pictures:
        with matplotlib.rc_context(DRAWN):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.add_subplot())
            figure.savefig(folder / name, dpi=110, metadata={"Software": None, "Description": digest(page)})


def digest(page: str) -> str:
    """Return what a picture of this page carries."""
    return sha256(page.encode()).hexdigest()


def _gains(axes: Axes, found: Sequence[Found]) -> None:
    """Draw each method's gain over the base optimizer, a task a row."""
    for row, task in enumerate(found):
        for i, (name, colour) in enumerate(COLOURS.items()):
            for length, hollow in HOLLOW.items():
                gain = task.gain(name, BASE, length)
                label = name if row == 0 and not hollow else None
                y = row + 0.15 * (i - 2) + 0.06 * hollow
                _point(axes, gain.value, y, gain.reach, colour, hollow, label)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(found)), [it.task for it in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("points of test accuracy over the base optimizer, 95 % intervals\n● equal epochs   ○ equal passes")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(COLOURS), frameon=False, fontsize=8)


def _prices(axes: Axes, found: Found) -> None:
    """Draw every method's accuracy, the best at equal epochs first."""
    order = sorted(found.tuned, key=lambda name: -found.mean(name).value)
    for row, name in enumerate(order):
        for length, hollow in HOLLOW.items():
            at = found.mean(name, length)
            _point(axes, at.value, row + 0.2 * hollow, at.error, COLOURS.get(name, "#8b95a5"), hollow)
    called = TASKS[found.task].called
    axes.set_yticks(range(len(order)), [f"{called(name)}  {found.passes(name):.3g}" for name in order])
    axes.invert_yaxis()
    axes.set_title(f"{found.task}; beside the names: passes a step", fontsize=10)
    axes.set_xlabel("test accuracy, %, with standard errors\n● equal epochs   ○ equal passes")


def _point(axes: Axes, x: float, y: float, reach: float, colour: str, hollow: bool, label: str | None = None) -> None:
    face = "white" if hollow else colour
    axes.errorbar(x, y, xerr=reach, fmt="o", markersize=5, color=colour, markerfacecolor=face, label=label)
