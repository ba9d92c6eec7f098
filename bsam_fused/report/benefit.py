"""What sharpness-aware steps are for: digits learned from labels many of which are wrong, by SGD, SAM and BSAM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, stdev

from bsam_fused.report.training import runner
from bsam_fused.report.training.methods import BASE
from bsam_fused.report.training.runs import Row, Run, plan
from bsam_fused.report.training.tasks import TASKS

TASK = "digits, 40 % noise"
REPLACED_PERCENT = 40.0
RADII: dict[str, list[float | None]] = {BASE: [None], "SAM": [0.6], "BSAM": [0.3]}
"""Of four each, by labels as wrong as those that are trained on, of images that are not tested: docs/results.md."""


@dataclass(frozen=True)
class Outcome:
    """What the runs of an optimizer gave."""

    optimizer: str
    rho: float | None
    accuracies_percent: list[float]
    """Of test images named rightly, a run."""
    accuracy_percent: float
    """The mean."""
    spread_percent: float
    """The standard deviation over the runs; 0 of one."""
    seconds: float
    """Of a run: the mean, a core each."""


@dataclass(frozen=True)
class Benefit:
    """All runs that were finished, and what they gave."""

    epochs: int
    replaced_percent: float
    training_images: int
    test_images: int
    outcomes: list[Outcome]
    rows: list[Row]


def runs(seeds: int, epochs: int | None = None) -> list[Run]:
    """Return what is to be trained: each optimizer with each of so many seeds."""
    return plan([TASK], RADII, range(seeds), epochs)


def train(wanted: list[Run]) -> Iterator[Row]:
    """Train, a run a core; yield the rows as they come."""
    return runner.run(wanted)


def summary(rows: list[Row]) -> Benefit:
    """Return what finished runs gave, at least one."""
    data = TASKS[TASK].data(0)
    ordered = sorted(rows, key=lambda row: (list(RADII).index(row.optimizer), row.seed))
    return Benefit(
        epochs=rows[0].epochs,
        replaced_percent=REPLACED_PERCENT,
        training_images=len(data.training.y),
        test_images=len(data.test.y),
        outcomes=[_outcome([row for row in ordered if row.optimizer == name]) for name in _names(ordered)],
        rows=ordered,
    )


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.optimizer for row in rows))


def _outcome(rows: list[Row]) -> Outcome:
    accuracies = [row.accuracy_percent for row in rows]
    return Outcome(
        optimizer=TASKS[TASK].called(rows[0].optimizer),
        rho=rows[0].rho,
        accuracies_percent=accuracies,
        accuracy_percent=fmean(accuracies),
        spread_percent=stdev(accuracies) if accuracies[1:] else 0.0,
        seconds=fmean(row.seconds for row in rows),
    )
