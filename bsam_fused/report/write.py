"""The report as a terminal's table, as a page and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from bsam_fused.report import figures
from bsam_fused.report.results import Report

PAGE = "page.html.jinja"


def table(report: Report) -> Table:
    """Return the measurements, an implementation a line."""
    shown = Table(
        title=f"A training step on the CPU, threads: {report.machine.threads}; median of {timed(report)} steps"
    )
    shown.add_column("implementation")
    for column in ("step\nms", "passes\nms", "optimizer\nms", "overhead\n%", "test accuracy\n%"):
        shown.add_column(column, justify="right")
    for row in report.measurements:
        times = (row.step_ms, row.passes_ms, row.optimizer_ms)
        shown.add_row(
            row.name,
            *(f"{ms:.2f}" for ms in times),
            f"{row.overhead_percent:.1f}",
            f"{row.test_accuracy_percent:.1f}",
        )
    return shown


def timed(report: Report) -> int:
    """Return how many steps the medians are over."""
    return report.steps - report.warm_up


def verdict(report: Report) -> str:
    """Return one sentence: whether fused and plain training gave the same losses, and how far they are apart."""
    deviations = ", ".join(f"{found.method} {found.deviation:.1e}" for found in report.comparisons)
    agree = "agree" if report.agree else "DIFFER"
    return (
        f"Fused and plain losses {agree} over {report.steps} float64 steps: "
        f"largest relative difference {deviations}; allowed {report.rtol:.0e}."
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
    texts = {"index.html": page(report), "report.json": json.dumps(content, indent=2) + "\n"}
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
        verdict=verdict(report),
        timed=timed(report),
        losses=figures.losses(report),
        steps=figures.steps(report),
        optimizers=figures.optimizers(report),
    )


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
