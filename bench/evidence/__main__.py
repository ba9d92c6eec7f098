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
from rich.table import Table

from bench.evidence import criterion, page, pictures, protocol
from bench.evidence.protocol import PLANS
from bench.evidence.results import Found
from bench.evidence.rows import FOLDER, all_found, file_of, rows_of
from bsam_fused.report import ctrl_c
from bsam_fused.report.command import positive
from bsam_fused.report.models import Refused
from bsam_fused.report.training import runner
from bsam_fused.report.training.runs import Run
from bsam_fused.report.training.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def wanted(task: str) -> Iterator[list[Run]]:
    """Yield what is to be trained: first what chooses the radii, then, once its rows are there, what is reported."""
    while missing(runs := protocol.tuning(task, rows_of(task))):
        yield runs
    yield protocol.tests(task, protocol.tuned(task, rows_of(task)))


def missing(runs: Sequence[Run]) -> set[Run]:
    """Return those of a task that there is no row of."""
    return set(runs) - {row.run for row in rows_of(runs[0].task)}


def train(task: str, workers: int | None) -> None:
    """Make the rows of a task that are missing."""
    FOLDER.mkdir(exist_ok=True)
    for runs in wanted(task):
        with Progress(console=Console(stderr=True)) as progress:
            shown = progress.add_task(f"{task}, {runs[0].split}", total=len(missing(runs)))
            for row in runner.run(runs, file_of(task), workers):
                progress.advance(shown)
                progress.console.print(f"{row.optimizer} ρ = {row.rho} seed {row.seed}: {row.accuracy_percent:.1f} %")


def train_all(tasks: Sequence[str], workers: int | None) -> dict[str, str]:
    """Train all tasks that can be had here; return the others, and why not."""
    left_out = {task: why for task in tasks if (why := lacking(task))}
    for task in tasks:
        if task not in left_out:
            train(task, workers)
    return left_out


def show_plan(tasks: Sequence[str]) -> None:
    """Print how many runs there are, how many are missing, and what those take."""
    shown = Table("task", "runs", "missing", "core-hours of these")
    hours = 0.0
    for task in tasks:
        runs = all_runs(task)
        left = missing(runs)
        hours += protocol.hours(left)
        shown.add_row(task, str(len(runs)), str(len(left)), f"{protocol.hours(left):.1f}")
    about = "without measuring, and radii beyond the first four; on the CPU that PLANS' seconds are of."
    Console().print(shown, f"{hours:.1f} core-hours of training are missing, {about}")


def all_runs(task: str) -> list[Run]:
    """Return all runs of a task, as far as its rows tell which there are."""
    rows = rows_of(task)
    try:
        reported = protocol.tests(task, protocol.tuned(task, rows))
    except LookupError:
        reported = protocol.reported(task)
    return [*protocol.tuning(task, rows), *reported]


def lacking(task: str) -> str:
    """Return what keeps a task from being trained here: its data, or a package; "" where nothing does."""
    try:
        TASKS[task].data(0)
    except (Refused, ModuleNotFoundError) as why:
        return str(why)
    return ""


def written_page() -> tuple[list[Found], str]:
    """Return the tasks whose rows are all there, and the page of all rows."""
    (found, unfinished), rises = all_found(), criterion.written()
    return found, page.page(found, unfinished, criterion.judge(found, rises), rises)


def write_page() -> None:
    """Write the page and its pictures."""
    found, text = written_page()
    PAGE.write_text(text, encoding="utf-8")
    pictures.write(found, text, PAGE.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0; 1 where a task was left out; 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    try:
        if not options.page:
            show_plan(options.task)
        if options.plan:
            return 0
        with ctrl_c.noted():
            ctrl_c.defer()
            left_out = {} if options.page else train_all(options.task, options.workers)
    except Refused as refused:
        print(f"python -m bench.evidence: {refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return ctrl_c.STATUS
    write_page()
    for task, why in left_out.items():
        print(f"{task} was left out: {why}", file=sys.stderr)
    return 1 if left_out else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=(__doc__ or "").splitlines()[0])
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print runs and core-hours, and train nothing")
    instead.add_argument("--page", action="store_true", help="write the page of the rows that are there")
    parser.add_argument("--task", nargs="+", choices=list(PLANS), default=list(PLANS), help="(default: all)")
    parser.add_argument("--workers", type=positive, help="processes, of a thread each (default: one a core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
