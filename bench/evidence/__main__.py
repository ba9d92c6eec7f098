"""Trains what `protocol` asks for, and writes docs/results.md of the rows.

python -m bench.evidence [--plan | --page] [--task NAME]... [--workers N]

A run a core, each row written as it comes into bench/results/evidence/: what is there already is not made again, so it
can be ended at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench.evidence import protocol
from bench.evidence.protocol import PLANS
from bsam_fused.report import ctrl_c
from bsam_fused.report.command import positive
from bsam_fused.report.training import runner
from bsam_fused.report.training.runs import Row, Run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "evidence"


def file_of(task: str) -> Path:
    """Return where the rows of a task are."""
    return RESULTS / f"{task.replace(' %', '').replace(',', '').replace(' ', '_')}.jsonl"


def rows_of(task: str) -> list[Row]:
    """Return the rows of a task."""
    return runner.written(file_of(task))


def wanted(task: str) -> Iterator[list[Run]]:
    """Yield what is to be trained: first what chooses the radii, then, once its rows are there, what is reported."""
    yield protocol.tuning(task)
    yield protocol.tests(task, protocol.tuned(task, rows_of(task)))


def train(task: str, workers: int | None) -> None:
    """Make the rows of a task that are missing."""
    for runs in wanted(task):
        with Progress(console=Console(stderr=True)) as progress:
            shown = progress.add_task(f"{task}, {runs[0].split}", total=len(runs))
            for row in runner.run(runs, file_of(task), workers):
                progress.advance(shown)
                progress.console.print(f"{row.optimizer} ρ = {row.rho} seed {row.seed}: {row.accuracy_percent:.1f} %")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with ctrl_c.noted():
            ctrl_c.defer()
            for task in options.task:
                train(task, options.workers)
    except KeyboardInterrupt:
        return ctrl_c.STATUS
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=list(PLANS), default=list(PLANS), help="(default: all)")
    parser.add_argument("--workers", type=positive, help="processes, of a thread each (default: one a core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
