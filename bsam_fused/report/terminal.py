"""The report in a terminal, or in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from bsam_fused.report import said
from bsam_fused.report.results import Report
from bsam_fused.report.rows import Row

Columns = dict[str, Callable[[Row], str]]
FEWER = (
    ("step\nms", "spread\nof steps", "optimizer\nms", "optimizer\nover passes"),
    ("step\nms", "optimizer\nover passes"),
)
"""Columns for narrow terminals."""


def show(report: Report, console: Console) -> None:
    """Print what the page says, in its order."""
    lines = []
    if report.benefit:
        lines += [said.task(report.benefit), *(f"  {said.outcome(found)}" for found in report.benefit.outcomes), ""]
    if report.rows:
        lines += [f"A training step of {report.model}: {report.batch}, {report.dtype}, on {report.device}."]
        lines += [f"  {name}: {words}" for name, words in said.who(report).items()]
        lines += [said.banner(report)] if said.banner(report) else []
    say(console, lines)
    if report.rows:
        table(report, console)
    lines = [*said.cost(report), *([said.verdict(report.learning)] if report.learning else [])]
    lines += [f"Not measured: {name}: {why}" for name, why in report.absent.items()]
    lines += ["Interrupted: the report is partial."] if report.partial else []
    say(console, [*lines, said.NEXT])


def say(console: Console, lines: Sequence[str]) -> None:
    """Print lines whole: the terminal breaks them."""
    for line in lines:
        console.print(line, soft_wrap=True)


def table(report: Report, console: Console) -> None:
    """Print the timed steps: with as many columns as the width has room for, and where it has none, a figure a line."""
    columns = _columns(report)
    for titles in (tuple(columns), *FEWER):
        shown = _table(report, {title: columns[title] for title in titles})
        if console.measure(shown, options=console.options.update(width=10_000)).maximum <= console.width:
            console.print(shown)
            return
    for row in report.rows:
        figures = (f"  {' '.join(title.split())}: {cell(row)}" for title, cell in columns.items())
        console.print(row.name, *figures, sep="\n", soft_wrap=True)


def _columns(report: Report) -> Columns:
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
