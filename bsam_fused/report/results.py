"""What the runs gave, in figures: the report's content, whatever shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from bsam_fused.report.machine import Machine
from bsam_fused.report.train import Digits, Recipe, Run

WARM_UP = 10
"""Steps whose times do not count: memory is allocated, kernels are chosen."""
RTOL = 1e-6
"""How far losses may differ in float64, relative. Rounding was seen to leave 2e-13, a radius wrong by 1e-5: 3e-4."""


@dataclass(frozen=True)
class Measurement:
    """One implementation's times a step (medians, milliseconds), and how well it trained."""

    method: str
    kind: str
    step_ms: float
    passes_ms: float
    optimizer_ms: float
    overhead_percent: float
    test_accuracy_percent: float
    epoch_losses: list[float]

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        return f"{self.method}, {self.kind}"


@dataclass(frozen=True)
class Comparison:
    """How far the losses of a method's fused and plain training are apart, relative, at the worst step."""

    method: str
    deviation: float
    agree: bool


@dataclass(frozen=True)
class Report:
    """All there is to show."""

    date: str
    machine: Machine
    backend: str
    backend_why: str
    recipe: Recipe
    training_images: int
    test_images: int
    parameters: int
    tensors: int
    steps: int
    warm_up: int
    measurements: list[Measurement]
    rtol: float
    comparisons: list[Comparison]

    @property
    def agree(self) -> bool:
        """Whether fused and plain training gave the same losses, for every method."""
        return all(comparison.agree for comparison in self.comparisons)


def measure(run: Run, data: Digits, recipe: Recipe) -> Measurement:
    """Return a finished run's figures. The overhead is the optimizer's time over the passes'.

    Args:
        run: at least one step of it.
        data: whose test images to name.
        recipe: that it was trained by.
    """
    begin = warm_up(len(run.losses))
    passes, own = run.passes[begin:], run.own[begin:]
    per_epoch = len(run.losses) // recipe.epochs
    return Measurement(
        method=run.implementation.method,
        kind=run.implementation.kind,
        step_ms=1e3 * median(a + b for a, b in zip(passes, own, strict=True)),
        passes_ms=1e3 * median(passes),
        optimizer_ms=1e3 * median(own),
        overhead_percent=100 * median(own) / median(passes),
        test_accuracy_percent=100 * run.accuracy(data),
        epoch_losses=[fmean(run.losses[i : i + per_epoch]) for i in range(0, len(run.losses), per_epoch)],
    )


def warm_up(steps: int) -> int:
    """Return how many of so many steps' times do not count; some always do."""
    return min(WARM_UP, steps // 2)


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Return, a method, how far its runs' losses are apart; NaN never agrees.

    Args:
        runs: finished float64 runs, two a method: the reference, then the one to check.
    """
    comparisons = []
    for plain, fused in zip(runs[0::2], runs[1::2], strict=True):
        expected, found = (torch.tensor(run.losses, dtype=torch.float64) for run in (plain, fused))
        deviation = ((found - expected).abs() / expected.abs()).max().item()
        comparisons.append(Comparison(plain.implementation.method, deviation, deviation <= RTOL))
    return comparisons
