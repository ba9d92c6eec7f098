"""What the rows say: means, gains between methods with the same seeds, and whether they are decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy import stats

from bench.evidence import protocol
from bsam_fused.report.training.runs import Row
from bsam_fused.report.training.tasks import TASKS

CONFIDENCE = 0.95
Length = Literal["epochs", "passes", "better"]
"""As many epochs as the task has, as many passes as exact BSAM takes in them, or that with the better mean of these."""
Verdict = Literal["more", "less", "open"]


@dataclass(frozen=True)
class Mean:
    """The mean of numbers, and its standard error."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.error:.1f}"


@dataclass(frozen=True)
class Gain(Mean):
    """The mean of paired differences, in points of percent."""

    @property
    def reach(self) -> float:
        """How far the interval of `CONFIDENCE` reaches to both sides: Student's t."""
        return self.error * float(stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1))

    @property
    def verdict(self) -> Verdict:
        """Whether the interval is above 0, below, or neither."""
        if not abs(self.value) > self.reach:  # of one seed nothing is known: NaN
            return "open"
        return "more" if self.value > 0 else "less"

    def __str__(self) -> str:
        return f"{self.value:+.1f} ± {self.error:.1f}"


def mean(numbers: Sequence[float]) -> Mean:
    """Return the mean and its standard error, NaN of one number."""
    error = stdev(numbers) / math.sqrt(len(numbers)) if numbers[1:] else math.nan
    return Mean(fmean(numbers), error, len(numbers))


def accuracy(row: Row) -> float:
    """Return what is compared, unless something else is asked for."""
    return row.accuracy_percent


@dataclass(frozen=True)
class Found:
    """A task whose runs are all there."""

    task: str
    tuned: dict[str, float | None]
    tuning: list[Row]
    """Rows of the validation split."""
    rows: dict[tuple[str, float | None, int], list[Row]]
    """(method, ρ, epochs) -> rows of the test split, in the order of their seeds."""

    def of(self, method: str, length: Length = "epochs") -> list[Row]:
        """Return a method's rows, at the radius that was chosen; KeyError where it was not trained so long."""
        return self.rows[method, self.tuned[method], self.epochs(method, length)]

    def has(self, method: str, length: Length = "epochs") -> bool:
        """Return whether a method was trained so long."""
        needed: list[Length] = ["epochs", "passes"] if length == "better" else [length]
        return method in self.tuned and all(
            (method, self.tuned[method], self.epochs(method, each)) in self.rows for each in needed
        )

    def epochs(self, method: str, length: Length) -> int:
        """Return the epochs of a method's runs."""
        if length == "better":
            both: list[Length] = [each for each in ("epochs", "passes") if self.has(method, each)]
            length = max(both, key=lambda each: self.mean(method, each).value)
        return TASKS[self.task].epochs if length == "epochs" else protocol.as_long_as_bsam(self.task, method)

    def mean(self, method: str, length: Length = "epochs", of: Callable[[Row], float] = accuracy) -> Mean:
        """Return a method's mean over seeds."""
        return mean([of(row) for row in self.of(method, length)])

    def gain(
        self,
        method: str,
        over: str,
        length: Length = "epochs",
        over_length: Length | None = None,
        of: Callable[[Row], float] = accuracy,
    ) -> Gain:
        """Return by how much a method is above another, seed by seed; ``over_length``: None: the same."""
        pairs = zip(self.of(method, length), self.of(over, over_length or length), strict=True)
        found = mean([of(row) - of(other) for row, other in pairs])
        return Gain(found.value, found.error, found.n)

    def passes(self, method: str) -> float:
        """Return the passes a step that a method took at equal epochs, the mean of its runs."""
        return self.mean(method, of=lambda row: row.passes / row.steps).value

    def at_edge(self, method: str) -> bool:
        """Return whether the radius that was chosen is its ladder's first or last."""
        ladder = protocol.ladder(self.task, method)
        return self.tuned[method] in (ladder[0], ladder[-1])

    def of_sam(self) -> dict[float, list[Row]]:
        """Return SAM's rows at each radius that was tried first, and at the one chosen: ρ -> rows."""
        epochs = TASKS[self.task].epochs
        ladder = protocol.ladder(self.task, "SAM")
        return {rho: self.rows["SAM", rho, epochs] for rho in ladder if ("SAM", rho, epochs) in self.rows}


def found(task: str, rows: Sequence[Row]) -> Found | None:
    """Return what a task's rows say; None where some are missing."""
    there = {row.run: row for row in rows}
    try:
        tuned = protocol.tuned(task, rows)
    except LookupError:
        return None
    wanted = protocol.tests(task, tuned)
    if any(run not in there for run in wanted):
        return None
    grouped: dict[tuple[str, float | None, int], list[Row]] = {}
    for run in wanted:
        grouped.setdefault((run.optimizer, run.rho, run.epochs), []).append(there[run])
    return Found(task, tuned, [there[run] for run in protocol.tuning(task, rows)], grouped)
