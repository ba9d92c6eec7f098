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
from bsam_fused.report.training.methods import BASE, METHODS
from bsam_fused.report.training.tasks import TASKS

COLOURS = dict(zip(EVERYWHERE[1:], ("#3d8bfd", "#e8743b", "#d9a520", "#a06cd5", "#12a594"), strict=True))
DRAWN = {key: "#222222" if value == INK else value for key, value in STYLE.items()}
"""The report's style, its ink black: a page has no colour of its own to lend."""
LENGTHS: dict[Length, str] = {"epochs": "equal epochs", "passes": "equal passes"}


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
        ("results_gains.png", lambda axes: _gains(axes, found), (8, 1.6 + 0.75 * len(found))),
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
            for length, words in LENGTHS.items():
                gain = task.gain(name, BASE, length)
                label = f"{name}, {words}" if row == 0 else None
                face = colour if length == "epochs" else "white"
                y = row + 0.13 * (i - 2) + (0.04 if length == "passes" else -0.04)
                axes.errorbar(gain.value, y, xerr=gain.reach, fmt="o", ms=5, color=colour, mfc=face, label=label)
    axes.axvline(0, color="#888", linewidth=1)
    axes.set_yticks(range(len(found)), [it.task for it in found])
    axes.invert_yaxis()
    axes.set_xlabel("points of test accuracy over the base optimizer, with 95 % intervals")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, frameon=False, fontsize=8)


def _prices(axes: Axes, found: Found) -> None:
    """Draw accuracy against passes a step, a method a point."""
    for name in found.tuned:
        at, passes = found.mean(name), METHODS[name].passes
        colour = COLOURS.get(name, "#8b95a5")
        axes.errorbar(passes, at.value, yerr=at.error, fmt="o", ms=5, color=colour)
        said = TASKS[found.task].base.build.__name__ if name == BASE else name
        axes.annotate(said, (passes, at.value), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="passes a step", ylabel="test accuracy, %", title=f"{found.task}, equal epochs")
    axes.set_xlim(0.8, 4)
