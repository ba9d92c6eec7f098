"""Whether rows can be had again: some of them drawn at random, and others' seeds in the place of theirs.

python -m bench.evidence.again [--rows N] [--seed S]
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.evidence.protocol import PLANS
from bench.evidence.results import Found, accuracy, mean
from bench.evidence.rows import all_found, rows_of
from bsam_fused.report.command import positive
from bsam_fused.report.training import runner
from bsam_fused.report.training.runs import Row

FAR = 4.2
"""Standard errors that means over other seeds may lie apart: chance does it once in 40,000 times, of many runs."""
BEYOND = 20
"""Added to seeds that are reported: others, and none that has chosen a radius."""


def same(drawn: Sequence[Row]) -> bool:
    """Train rows again; print and return whether all are the same to the last bit."""
    before = {row.run: row for row in drawn}
    differ = [row for row in runner.run(list(before)) if _numbers(row) != _numbers(before[row.run])]
    for row in differ:
        print(f"DIFFERS: {row.command}: {_numbers(row)}, not {_numbers(before[row.run])}")
    print(f"{len(before) - len(differ)} of {len(before)} rows are the same, to the last bit")
    return not differ


def near(found: Found, method: str) -> bool:
    """Train a method with other seeds; print and return whether its mean lies near."""
    rows = found.of(method)
    others = runner.run([replace(row.run, seed=row.seed + BEYOND) for row in rows])
    mine, its = found.mean(method), mean([accuracy(row) for row in others])
    apart = abs(mine.value - its.value) / math.hypot(mine.error, its.error)
    print(f"{found.task}, {method}: {mine}, with other seeds {its}: {apart:.1f} standard errors apart")
    return apart <= FAR


def _numbers(row: Row) -> str:
    """Return what must be the same, as text: NaN is no number's equal."""
    return f"{row.accuracy_percent!r} %, training loss {row.training_loss!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0; 1 where a row differs, or a mean lies far off."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.again", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=positive, default=10, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    rows = [row for task in PLANS for row in rows_of(task)]
    found, _ = all_found()
    if not found:
        parser.error("no task's rows are all there: python -m bench.evidence makes them")
    task = draw.choice(found)
    good = same(draw.sample(rows, min(options.rows, len(rows))))
    return 0 if near(task, draw.choice(list(task.tuned))) and good else 1


if __name__ == "__main__":
    sys.exit(main())
