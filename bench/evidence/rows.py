"""The rows that there are: a file a task, which grows by a line a run."""

from __future__ import annotations

from pathlib import Path

from bench.evidence import results
from bench.evidence.protocol import PLANS
from bench.evidence.results import Found
from bsam_fused.report.training import runner
from bsam_fused.report.training.runs import Row

FOLDER = Path(__file__).parents[1] / "results" / "evidence"


def file_of(task: str) -> Path:
    """Return where the rows of a task are."""
    return FOLDER / f"{task.replace(' %', '').replace(',', '').replace(' ', '_')}.jsonl"


def rows_of(task: str) -> list[Row]:
    """Return the rows of a task."""
    return runner.written(file_of(task))


def all_found() -> tuple[list[Found], dict[str, int]]:
    """Return the tasks whose rows are all there, and how many rows each of the others has."""
    there = {task: rows_of(task) for task in PLANS}
    found = {task: results.found(task, rows) for task, rows in there.items()}
    return [it for it in found.values() if it], {task: len(there[task]) for task, it in found.items() if not it}
