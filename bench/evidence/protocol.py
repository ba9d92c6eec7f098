"""Which runs there are, and how radii are chosen: written down before any of them was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Plan:
    """How a task is treated."""

    ladder: tuple[float, float, float, float]
    """SAM's radii, of which one is chosen."""
    seeds: int
    methods: Sequence[str] = EVERYWHERE
    longer: Sequence[str] = EVERYWHERE
    """Methods also trained until all have taken as many passes as exact BSAM."""


_DIGITS = (0.1, 0.25, 0.6, 1.5)
PLANS = {
    "digits, 40 % noise": Plan(_DIGITS, 10, tuple(METHODS), tuple(METHODS)),
    "digits": Plan(_DIGITS, 10, tuple(METHODS)),
    "digits, 60 % noise": Plan(_DIGITS, 10, tuple(METHODS)),
    "digits, 20 % noise": Plan(_DIGITS, 10, tuple(METHODS)),
}


def radii(task: str, method: str) -> list[float | None]:
    """Return those of which a method's is chosen."""
    if method == BASE:
        return [None]
    return [float(f"{SCALES.get(method, 1.0) * rho:.3g}") for rho in PLANS[task].ladder]


def tuning(task: str) -> list[Run]:
    """Return the runs by whose validation accuracy radii are chosen."""
    chosen = [method for method in PLANS[task].methods if method != BASE]
    return [
        Run(task, method, rho, seed, TASKS[task].epochs, "validation")
        for seed in TUNING_SEEDS
        for method in chosen
        for rho in radii(task, method)
    ]


def tuned(task: str, rows: Iterable[Row]) -> dict[str, float | None]:
    """Return each method's radius: that of the best mean validation accuracy, of equal ones the smallest.

    Raises:
        LookupError: rows of `tuning` are missing.
    """
    there = {row.run: row for row in rows}
    missing = [run for run in tuning(task) if run not in there]
    if missing:
        raise LookupError(f"{task}: {len(missing)} of {len(tuning(task))} tuning runs are missing")

    def accuracy(method: str, rho: float | None) -> float:
        runs = [run for run in tuning(task) if (run.optimizer, run.rho) == (method, rho)]
        return fmean(there[run].accuracy_percent for run in runs)

    return {
        method: None if method == BASE else max(radii(task, method), key=lambda rho: accuracy(method, rho))
        for method in PLANS[task].methods
    }


def tests(task: str, chosen: dict[str, float | None]) -> list[Run]:
    """Return the runs that are reported: equal epochs, then equal passes, then SAM at the radii not chosen."""
    plan, epochs = PLANS[task], TASKS[task].epochs
    wanted = [(method, rho, epochs) for method, rho in chosen.items()]
    wanted += [(method, chosen[method], as_long_as_bsam(task, method)) for method in plan.longer]
    wanted += [("SAM", rho, epochs) for rho in radii(task, "SAM")]
    runs = [
        Run(task, method, rho, seed, length, "test") for method, rho, length in wanted for seed in range(plan.seeds)
    ]
    return list(dict.fromkeys(runs))


def as_long_as_bsam(task: str, method: str) -> int:
    """Return the epochs in which a method takes as many passes as exact BSAM does in the task's."""
    return round(METHODS["BSAM"].passes * TASKS[task].epochs / METHODS[method].passes)
