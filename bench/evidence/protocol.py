"""Which runs there are, and how radii are chosen: written down before any of them was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bsam_fused.report.training.methods import BASE, METHODS
from bsam_fused.report.training.runs import Row, Run
from bsam_fused.report.training.tasks import TASKS

TUNING_SEEDS = (100, 101)
EVERYWHERE = (BASE, "SAM", "BSAM", "BSAM extrapolated", "WSAM", "BSAM, last 50 %")
"""Methods that every task is trained by; the digits are by all."""
SCALES = {
    "BSAM": 0.5,
    "BSAM extrapolated": 0.5,
    "BSAM, last 50 %": 0.5,
    "BSAM, last 25 %": 0.5,
    "BSAM, last 10 %": 0.5,
    "BSAM from w_min": 0.5,
    "BSAM, ρ_min stays": 0.5,
    "BSAM extrapolated, c = 1": 0.5,
    "WSAM": 0.5,
    "LookSAM": 0.1,
    "AE-SAM": 2.0,
    "ASAM": 10.0,
    "SAM, norm layers": 5.0,
}
"""Times a task's ladder: a method's; of the others 1. BSAM perturbs to both sides, WSAM(⅔) weighs sharpness twice."""


FIRST = slice(2, 6)
"""Of a ladder: the four radii that are tried first."""


@dataclass(frozen=True)
class Plan:
    """How a task is treated."""

    ladder: tuple[float, ...]
    """SAM's radii, eight; `FIRST` are tried, and where the best of them is the last on a side, those beyond it."""
    seeds: int
    seconds: float
    """Of a core, that the base optimizer takes for the task's epochs: what `hours` reckons with."""
    methods: Sequence[str] = EVERYWHERE
    longer: Sequence[str] = EVERYWHERE
    """Methods also trained until all have taken as many passes as exact BSAM."""


_IMAGES = (0.0064, 0.016, 0.04, 0.1, 0.25, 0.6, 1.5, 4.0)
_DIGITS = (0.016, 0.04, 0.1, 0.25, 0.6, 1.5, 4.0, 10.0)
PLANS = {
    "digits": Plan(_DIGITS, 10, 3.2, tuple(METHODS)),
    "digits, 20 % noise": Plan(_DIGITS, 10, 3.2, tuple(METHODS)),
    "digits, 40 % noise": Plan(_DIGITS, 10, 3.2, tuple(METHODS), tuple(METHODS)),
    "digits, 60 % noise": Plan(_DIGITS, 10, 3.2, tuple(METHODS)),
    "CIFAR-10": Plan(_IMAGES, 5, 30.0),
    "CIFAR-10, 40 % noise": Plan(_IMAGES, 5, 30.0),
    "transfer": Plan(_IMAGES, 5, 7.0),
    "characters": Plan(_IMAGES, 5, 15.0),
}


def ladder(task: str, method: str) -> list[float]:
    """Return all radii that a method may be tried with, rising."""
    return [float(f"{SCALES.get(method, 1.0) * rho:.3g}") for rho in PLANS[task].ladder]


def tuning(task: str, rows: Iterable[Row] = ()) -> list[Run]:
    """Return the runs by whose validation accuracy radii are chosen, as far as these rows tell which there are."""
    there = {row.run: row.accuracy_percent for row in rows}
    return [
        run for method in _searched(task) for rho in _search(task, method, there)[0] for run in _runs(task, method, rho)
    ]


def tuned(task: str, rows: Iterable[Row]) -> dict[str, float | None]:
    """Return each method's radius: that of the best mean validation accuracy, of equal ones the smallest.

    Raises:
        LookupError: rows of `tuning` are missing.
    """
    there = {row.run: row.accuracy_percent for row in rows}
    found: dict[str, float | None] = {BASE: None}
    for method in _searched(task):
        _, found[method] = _search(task, method, there)
        if found[method] is None:
            raise LookupError(f"{task}: tuning runs of {method} are missing")
    return {method: found[method] for method in PLANS[task].methods}


def _searched(task: str) -> list[str]:
    return [method for method in PLANS[task].methods if method != BASE]


def _runs(task: str, method: str, rho: float) -> list[Run]:
    return [Run(task, method, rho, seed, TASKS[task].epochs, "validation") for seed in TUNING_SEEDS]


def _search(task: str, method: str, there: Mapping[Run, float]) -> tuple[list[float], float | None]:
    """Return the radii that are tried, and the best of them; None for it where accuracies are missing."""
    radii = ladder(task, method)
    first, end = FIRST.start, FIRST.stop
    while True:
        tried = radii[first:end]
        if any(run not in there for rho in tried for run in _runs(task, method, rho)):
            return tried, None
        best = max(tried, key=lambda rho: fmean(there[run] for run in _runs(task, method, rho)))
        if best == tried[0] and first > 0:
            first -= 1
        elif best == tried[-1] and end < len(radii):
            end += 1
        else:
            return tried, best


def tests(task: str, chosen: dict[str, float | None]) -> list[Run]:
    """Return the runs that are reported: equal epochs, then equal passes, then SAM at the first radii not chosen."""
    plan, epochs = PLANS[task], TASKS[task].epochs
    wanted = [(method, rho, epochs) for method, rho in chosen.items()]
    wanted += [(method, chosen[method], as_long_as_bsam(task, method)) for method in plan.longer]
    wanted += [("SAM", rho, epochs) for rho in ladder(task, "SAM")[FIRST]]
    runs = [
        Run(task, method, rho, seed, length, "test") for method, rho, length in wanted for seed in range(plan.seeds)
    ]
    return list(dict.fromkeys(runs))


def reported(task: str) -> list[Run]:
    """Return as many runs as `tests`, before any radius is chosen."""
    return tests(
        task, {method: None if method == BASE else ladder(task, method)[FIRST][0] for method in PLANS[task].methods}
    )


def hours(runs: Iterable[Run]) -> float:
    """Return the core-hours that runs take, by what a pass of the base optimizer takes; measuring is extra."""
    base = {task: plan.seconds / TASKS[task].epochs for task, plan in PLANS.items()}
    return sum(base[run.task] * run.epochs * METHODS[run.optimizer].passes for run in runs) / 3600


def as_long_as_bsam(task: str, method: str) -> int:
    """Return the epochs in which a method takes as many passes as exact BSAM does in the task's."""
    return round(METHODS["BSAM"].passes * TASKS[task].epochs / METHODS[method].passes)
