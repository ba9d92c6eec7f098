"""The report in a terminal, or in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from bsam_fused.report import said
from bsam_fused.report.results import Report
from bsam_fused.report.rows import Row

Columns = dict[str, Callable[[Row], str]]


def show(report: Report, console: Console, last: Sequence[str]) -> None:
    """Print what the page says, in its order. Args: last: the lines at the end."""
    lines = []
    if report.benefit:
        lines += [said.task(report.benefit), *(f"  {said.outcome(found)}" for found in report.benefit.outcomes), ""]
    console.print(*lines, *([said.banner(report)] if said.banner(report) else []), sep="\n", soft_wrap=True)
    if report.rows:
        console.print(
            f"A training step of {report.model}: {report.batch}, {report.dtype}, on {report.device}", soft_wrap=True
        )
        table(report, console)
    lines = [*said.cost(report), *([said.verdict(report.learning)] if report.learning else [])]
    lines += [f"{name}: {words}" for name, words in said.who(report).items()]
    lines += [f"Not measured: {name}: {why}" for name, why in report.absent.items()]
    if report.partial:
        lines.append("Interrupted: the report is partial.")
    console.print(*lines, *last, sep="\n", soft_wrap=True)


def table(report: Report, console: Console) -> None:
    """Print the timed steps: with as many columns as the width has room for, and where it has none, a figure a line."""
    for columns in (_all_columns(report), _few_columns(report)):
        shown = _table(report, columns)
        if console.measure(shown, options=console.options.update(width=10_000)).minimum <= console.width:
            console.print(shown)
            return
    for row in report.rows:
        figures = (f"  {' '.join(title.split())}: {cell(row)}" for title, cell in _all_columns(report).items())
        console.print(row.name, *figures, sep="\n", soft_wrap=True)


def _few_columns(report: Report) -> Columns:
    times = said.times(report)
    return {
        "step\nms": lambda row: times[row.name][3],
        "optimizer\nms": lambda row: times[row.name][1],
        "optimizer\nover passes": said.own_overhead,
    }


def _all_columns(report: Report) -> Columns:
    times = said.times(report)
    launched = any(row.launches is not None for row in report.rows)
    launches: Columns = {"launches": lambda row: str(row.launches)} if launched else {}
    return {
        "passes\nms": lambda row: times[row.name][0],
        "optimizer\nms": lambda row: times[row.name][1],
        "gaps\nms": lambda row: times[row.name][2],
        "step\nms": lambda row: times[row.name][3],
        "spread\nof steps": said.spread,
        "optimizer\nover passes": said.own_overhead,
        "step\nover passes": said.overhead,
        **launches,
    }


def _table(report: Report, columns: Columns) -> Table:
    """Return the table; what users get of each algorithm stands out."""
    shown, ours = Table(), said.chosen(report)
    shown.add_column("implementation", no_wrap=True)
    for title in columns:
        shown.add_column(title, justify="right", no_wrap=True)
    for row in report.rows:
        shown.add_row(row.name, *(cell(row) for cell in columns.values()), style="bold" if row in ours else "")
    return shown
