"""Makes the report: trains, measures, checks, writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from bsam_fused.ops import dispatch
from bsam_fused.report import results, train, write
from bsam_fused.report.machine import this_machine
from bsam_fused.report.results import Report
from bsam_fused.report.train import Digits, Implementation, Recipe, Run

TIMED = (train.SGD, train.PLAIN_SAM, train.FUSED_SAM, train.PLAIN_BSAM, train.FUSED_BSAM)
COMPARED = (train.PLAIN_SAM, train.FUSED_SAM, train.PLAIN_BSAM, train.FUSED_BSAM)
"""Pairs: the plain loops, then the fused optimizer that has to give the same losses."""


def make(out: Path, epochs: int | None = None) -> bool:
    """Train, print the table, and write the page and the figures.

    Args:
        out: a directory, for index.html and report.json.
        epochs: how long to train; None: as the recipe has it.

    Returns:
        Whether fused and plain training gave the same losses.

    Raises:
        ValueError, RuntimeError: BSAM_FUSED_BACKEND asks for a backend that cannot be had.
        OSError: ``out`` cannot be written to.
    """
    recipe = Recipe() if epochs is None else replace(Recipe(), epochs=epochs)
    with Progress(console=Console(stderr=True), refresh_per_second=2) as progress:
        report = measured(recipe, progress)
    write.files(report, out)
    console = Console()
    console.print(write.table(report))
    console.print(
        write.verdict(report), f"Written: {out / 'index.html'}, {out / 'report.json'}", sep="\n", soft_wrap=True
    )
    return report.agree


def measured(recipe: Recipe, progress: Progress) -> Report:
    """Return the whole report: float32 runs for the times, then float64 runs for the comparison.

    Args:
        recipe: what to train, and how.
        progress: shows how far it is.
    """
    data = train.digits(torch.float32)
    timed = _trained(TIMED, data, recipe, progress, "timing, float32")
    compared = _trained(COMPARED, train.digits(torch.float64), recipe, progress, "comparing, float64")
    choice = dispatch.choose("auto", torch.device("cpu"))
    params = list(timed[0].network.parameters())
    return Report(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=this_machine(),
        backend=choice.backend,
        backend_why=choice.why,
        recipe=recipe,
        training_images=len(data.y),
        test_images=len(data.y_test),
        parameters=sum(p.numel() for p in params),
        tensors=len(params),
        steps=train.steps(data, recipe),
        warm_up=results.warm_up(train.steps(data, recipe)),
        measurements=[results.measure(run, data, recipe) for run in timed],
        rtol=results.RTOL,
        comparisons=results.compare(compared),
    )


def _trained(
    implementations: Sequence[Implementation], data: Digits, recipe: Recipe, progress: Progress, title: str
) -> list[Run]:
    runs = train.prepare(implementations, recipe, data.x.dtype)
    for _ in progress.track(train.train(runs, data, recipe), total=train.steps(data, recipe), description=title):
        pass
    return runs
