"""What changed between two commits, beyond noise: `python -m bench.compare A B [--row NAME]... [--pairs N]`.

Both are checked out into git worktrees and built. Then a process of each takes steps in turns, A B B A, on the same
shapes; each pair gives one ratio. A change is told where the confidence interval of the median ratio leaves 1 out, and
no change where it is narrow; else it is said that it cannot be told.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.cases import SHAPES
from bsam_fused.report.contestant import Shapes

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")
ROWS = [
    f"{algorithm}-{base}-{shapes}"
    for shapes in ("resnet18", "tiny500")
    for algorithm in ("bsam", "sam")
    for base in ("sgd", "adamw")
]
WARM_UP = 3
CONFIDENCE = 0.99
NARROW = 0.03
"""An interval within 1 ± so much says that nothing changed."""


class Interval(NamedTuple):
    """The median of B's time over A's, and where it lies with `CONFIDENCE`."""

    median: float
    low: float
    high: float

    def verdict(self) -> str:
        """Return what can be said."""
        if self.low > 1:
            return "slower"
        if self.high < 1:
            return "faster"
        if self.low > 1 - NARROW and self.high < 1 + NARROW:
            return "same"
        return "cannot tell"


def interval(ratios: Sequence[float]) -> Interval:
    """Return the median's distribution-free interval: order statistics, by the binomial law of the sign test.

    For few ratios it is all there is: the whole line.
    """
    n, ordered = len(ratios), sorted(ratios)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outside, k = 0.0, 0
    while outside + math.comb(n, k) / 2**n <= (1 - CONFIDENCE) / 2:
        outside += math.comb(n, k) / 2**n
        k += 1
    return Interval(middle, ordered[k - 1], ordered[n - k]) if k else Interval(middle, 0.0, math.inf)


class Worker:
    """A process that takes steps with the package of one checkout. Args: how: device type and backend."""

    def __init__(self, checkout: Path, how: Sequence[str] = ("cpu", "cpp")) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, str(WORKER), *how]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)

    def ask(self, question: object) -> float:
        """Send a line; return the number that is answered."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended: its error is above")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@contextmanager
def built(commit: str) -> Iterator[Path]:
    """Give a checkout of a commit, built for CPUs.

    Raises:
        subprocess.CalledProcessError: no such commit, or it does not build.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(checkout), commit], cwd=ROOT, check=True)
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            environment = {**os.environ, "BSAM_FUSED_BUILD": "cpu"}
            subprocess.run(build, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
            yield checkout
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)


def compare(a: Worker, b: Worker, row: str, pairs: int, of: Callable[[Shapes], Shapes] = tuple) -> Interval:
    """Return how a row's times compare: B over A; a row: ALGORITHM-BASE-SHAPES[-DTYPE], the shapes ``of`` its own."""
    algorithm, base, shapes, *dtype = row.split("-")
    for worker in (a, b):
        worker.ask([algorithm, base, list(of(SHAPES[shapes])), *(dtype or ["float32"])])
    ratios = []
    for pair in range(-WARM_UP, pairs):
        order = (a, b) if pair % 2 else (b, a)
        seconds = {worker: worker.ask("step") for worker in order}
        if pair >= 0:
            ratios.append(seconds[b] / seconds[a])
    return interval(ratios)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where B is slower in some row."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", help="the commit before")
    parser.add_argument("b", help="the commit after")
    parser.add_argument("--row", action="append", choices=ROWS, help="default: all")
    parser.add_argument("--pairs", type=int, default=60, help="of steps, a row; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: at least 1")
    slower = False
    with ExitStack() as stack:
        checkouts = [stack.enter_context(built(commit)) for commit in (options.a, options.b)]
        workers = [Worker(checkout) for checkout in checkouts]
        for worker in workers:
            stack.callback(worker.close)
        for row in options.row or ROWS:
            found = compare(*workers, row, options.pairs)
            slower |= found.verdict() == "slower"
            print(
                f"{row:<22}B / A {found.median:6.3f}  [{found.low:.3f}, {found.high:.3f}]  {found.verdict()}",
                flush=True,
            )
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
