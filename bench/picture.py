"""What a step costs beside what it buys, as one picture, from a report of `make report` on a quiet machine.

python -m bench.picture report/report.json docs/report.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bsam_fused.report import figures
from bsam_fused.report.benefit import Outcome
from bsam_fused.report.rows import Row

IMPLEMENTATIONS = ("alone", "loops", "cpp")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture: white, so that it can be read on light and dark pages.

    Args:
        report: what report.json holds.
        path: the picture's; its suffix says what kind.

    Raises:
        ValueError: a report without training runs, or without timed steps.
    """
    if not report["benefit"] or not report["rows"]:
        raise ValueError("needs a whole report of --model digits")
    rows = [Row(**row) for row in report["rows"] if row["implementation"] in IMPLEMENTATIONS]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        buys, costs = figure.subplots(1, 2)
        figures.draw_accuracy(buys, [Outcome(**outcome) for outcome in report["benefit"]["outcomes"]])
        replaced = f"{report['benefit']['replaced_percent']:.0f} %"
        buys.set_title(f"trained with {replaced} of the labels replaced at random", fontsize=10)
        figures.draw_cost(costs, rows)
        costs.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)
        figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.json")
    parser.add_argument("picture", type=Path, help="to write: .png or .svg")
    options = parser.parse_args(arguments)
    draw(json.loads(options.report.read_text()), options.picture)
    print(f"Written: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
