"""python -m bsam_fused.report.training [--out ROWS.jsonl]: training runs, tasks × optimizers × radii × seeds.

Each gives a row of JSON with what was measured, where, and the command that repeats it. Run again after a kill, it
makes those that the file has no row of.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bsam_fused.report import ctrl_c
from bsam_fused.report.command import positive
from bsam_fused.report.models import Refused
from bsam_fused.report.training.methods import BASE, METHODS
from bsam_fused.report.training.runner import run
from bsam_fused.report.training.runs import Run, Split, plan
from bsam_fused.report.training.tasks import TASKS

PROGRAM = "python -m bsam_fused.report.training"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command's; None: those of the process.

    Returns:
        The exit status: 0; 1 where the rows cannot be had in that file; 130 where the user interrupted it.

    Raises:
        RuntimeError: a run failed; its traceback is shown.
        SystemExit: wrong usage (status 2), or ``--help`` (status 0).
    """
    options = _parser().parse_args(arguments)
    radii = {name: [None] if name == BASE else options.rho for name in options.optimizer}
    try:
        _make(plan(options.task, radii, options.seed, options.epochs, options.split), options.out, options.workers)
    except Refused as refused:
        print(f"{PROGRAM}: {refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return ctrl_c.STATUS
    return 0


def _make(wanted: Sequence[Run], out: Path, workers: int | None) -> None:
    try:
        out.open("ab").close()  # before anything is trained
    except OSError as error:
        raise Refused(f"--out {out}: {error}") from error
    left = len(wanted)  # whatever is not made is there
    for row in run(wanted, out, workers):
        left -= 1
        print(f"{row.command}: {row.accuracy_percent:.1f} % right, {row.seconds:.1f} s", flush=True)
    if left:
        print(f"{left} rows are there already: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0].partition(": ")[2])
    add = parser.add_argument
    add("--task", nargs="+", choices=list(TASKS), default=["digits, 40 % noise"], help="(default: digits, 40 %% noise)")
    add(
        "--optimizer",
        nargs="+",
        choices=list(METHODS),
        default=[BASE, "SAM", "BSAM"],
        help="over the task's base optimizer, or that alone (default: base SAM BSAM)",
    )
    add("--rho", nargs="+", type=_radius, default=[0.05], help="radii, of all but the base (default: 0.05)")
    add("--seed", nargs="+", type=int, default=[0, 1, 2], help="each once (default: 0 1 2)")
    add("--epochs", type=positive, help="of each run (default: the task's)")
    add("--split", choices=get_args(Split), default="test", help="what the networks are asked (default: test)")
    add("--workers", type=positive, help="processes, of a thread each (default: one a core)")
    add("--out", type=Path, default=Path("rows.jsonl"), help="rows are appended to it (default: %(default)s)")
    return parser


def _radius(text: str) -> float:
    try:
        rho = float(text)
    except ValueError:
        rho = math.nan
    if not 0 <= rho < math.inf:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return rho


if __name__ == "__main__":
    sys.exit(main())
