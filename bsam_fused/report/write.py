"""The report as a terminal's table, as a page and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from bsam_fused.report import figures
from bsam_fused.report.implementations import REFERENCE
from bsam_fused.report.learning import Learning
from bsam_fused.report.results import Report
from bsam_fused.report.rows import Row

PAGE = "page.html.jinja"


def table(report: Report) -> Table:
    """Return the measurements, an implementation a line; what users get of each algorithm stands out."""
    shown = Table(title=f"A training step: {report.model}, {report.batch}, {report.dtype}, on {report.device}")
    shown.add_column("implementation", no_wrap=True)
    launched = any(row.launches is not None for row in report.rows)
    columns = ("step\nms", "passes\nms", "optimizer\nms", "gaps\nms", "over k × pass\n%", "optimizer\n%")
    for column in (*columns, *(["launches"] if launched else [])):
        shown.add_column(column, justify="right")
    ours = chosen(report.rows)
    for row in report.rows:
        times = (row.step_ms, row.passes_ms, row.optimizer_ms, row.gaps_ms)
        percents = (f"{row.overhead_percent:+.1f}", f"{row.optimizer_percent:.1f}")
        cells = [row.name, *(f"{ms:.2f}" for ms in times), *percents, *([str(row.launches)] if launched else [])]
        shown.add_row(*cells, style="bold" if row in ours else "")
    return shown


def chosen(rows: list[Row]) -> list[Row]:
    """Return, of each algorithm, the row that users get: that of the backend that matters, the last one."""
    return list({row.algorithm: row for row in rows if row.passes > 1}.values())


def reference(report: Report, row: Row) -> str:
    """Return what the papers' loops of the same algorithm cost, in words; nothing where they were not measured."""
    loops = [it for it in report.rows if (it.algorithm, it.implementation) == (row.algorithm, REFERENCE)]
    return f"the papers' loops: +{loops[0].optimizer_percent:.1f} %" if loops else ""


def sentences(report: Report) -> list[str]:
    """Return what matters, in words: what a pass is, and what the optimizer adds to 1, 2, 3 of them."""
    if not report.rows:
        return ["Nothing was measured before the interruption."]
    said = [f"One pass (forward and backward) with {report.base} alone takes {report.base_pass_ms:.2f} ms."]
    for row in [report.rows[0], *chosen(report.rows)]:
        said.append(
            f"{row.name}: {row.passes} × that pass is {row.passes * report.base_pass_ms:.2f} ms; the optimizer's own "
            f"{row.optimizer_ms:.2f} ms are {row.optimizer_percent:.1f} % of it, and the whole step takes "
            f"{row.step_ms:.2f} ms ({row.overhead_percent:+.1f} %)."
        )
    return said


def lines(report: Report) -> str:
    """Return which algorithm's lines are drawn how: nothing where there is but one."""
    algorithms = list(dict.fromkeys(point.algorithm for point in report.points))
    return f"Full lines: {algorithms[-1]}; dotted: {', '.join(algorithms[:-1])}." if algorithms[1:] else ""


def verdict(learning: Learning) -> str:
    """Return one sentence: whether fused and plain training gave the same losses, and how far they are apart."""
    deviations = ", ".join(f"{found.method} {found.deviation:.1e}" for found in learning.comparisons)
    agree = "agree" if learning.agree else "DIFFER"
    return (
        f"Fused and plain losses {agree} over {learning.steps} float64 steps: "
        f"largest relative difference {deviations}; allowed {learning.rtol:.0e}."
    )


def files(report: Report, out: Path) -> None:
    """Write index.html and report.json, each whole or not at all.

    Args:
        report: what to write.
        out: a directory.

    Raises:
        OSError: ``out`` cannot be written to.
    """
    content = {**asdict(report), "agree": report.agree}
    texts = {"index.html": page(report), "report.json": json.dumps(content, indent=2, allow_nan=True) + "\n"}
    for name, text in texts.items():
        _replace(out / name, text)


def page(report: Report) -> str:
    """Return the page: one HTML file that needs no other."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(PAGE).render(
        report=report,
        chosen=chosen(report.rows),
        reference=reference,
        sentences=sentences(report),
        verdict=verdict(report.learning) if report.learning else "",
        lines=lines(report),
        figures=figures,
    )


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
