"""Two builds on a GPU, interleaved: what changed between them beyond noise, added to a run's record.

python -m bench.gpu.compare --record FILE.json BEFORE AFTER

Both are checkouts that are built. As `bench.compare`, whose worker and intervals these are; times are the GPU's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.compare import Worker, compare
from bench.gpu.device import condition, current
from bench.gpu.record import Record

ROWS = (
    *("bsam-sgd-resnet18", "bsam-sgd-gpt2", "sam-sgd-resnet18", "bsam-adamw-gpt2"),
    *("bsam-sgd-resnet18-bfloat16", "bsam-sgd-gpt2-bfloat16", "bsam-adamw-gpt2-bfloat16", "bsam-sgd-tiny500"),
)
PAIRS = 60
"""Of steps, a row."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where a build cannot take steps. A slower one is no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    record, device = Record(options.record), current()
    source = options.before / "COMMIT"
    clock = device.make_clock()
    with ExitStack() as stack:
        workers = [Worker(checkout, device.worker) for checkout in (options.before, options.after)]
        for worker in workers:
            stack.callback(worker.close)
        for row in device.some(ROWS):
            before = condition(clock)
            found = compare(*workers, row, PAIRS, device.shapes)
            record.content["compared"][row] = {
                **found._asdict(),
                "verdict": found.verdict(),
                "pairs": PAIRS,
                "before_commit": source.read_text().strip() if source.exists() else None,
                "before": before,
                "after": condition(clock),
            }
            record.save()
            print(
                f"{row}: after / before {found.median:.3f} [{found.low:.3f}, {found.high:.3f}] {found.verdict()}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
