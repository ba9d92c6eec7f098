"""python -m bsam_fused.report.training [--out ROWS.jsonl]: training runs, tasks × optimizers × radii × seeds.

Each gives a row of JSON with what was measured, where, and the command that repeats it. Run again after a kill, it
makes those that the file has no row of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bsam_fused.report.training.runner import run
from bsam_fused.report.training.runs import OPTIMIZERS, plan
from bsam_fused.report.training.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 0."""
    about = (__doc__ or "").splitlines()[0].partition(": ")
    parser = argparse.ArgumentParser(
        prog="python -m bsam_fused.report.training",
        description=about[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="what is trained")
    add("--optimizer", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="with SGD as the base")
    add("--rho", nargs="+", type=float, default=[0.05], help="radii, of all but SGD")
    add("--seed", nargs="+", type=int, default=[0, 1, 2], help="each once")
    add("--epochs", type=int, help="of each run (default: the task's)")
    add("--workers", type=int, help="processes, of a thread each (default: one a core)")
    add("--out", type=Path, default=Path("rows.jsonl"), help="rows are appended to it")
    options = parser.parse_args(arguments)
    radii = {name: [None] if name == "SGD" else options.rho for name in options.optimizer}
    for row in run(plan(options.task, radii, options.seed, options.epochs), options.out, options.workers):
        print(f"{row.command}: {row.test_accuracy_percent:.1f} % right, {row.seconds:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
