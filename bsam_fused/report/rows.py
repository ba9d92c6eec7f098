"""Timed steps in figures. Needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bsam_fused.report.timing import Timed


@dataclass(frozen=True)
class Row:
    """One implementation's step: medians, in milliseconds."""

    algorithm: str
    implementation: str
    passes: int
    """Forward and backward passes in a step."""
    steps: int
    """That the medians are over."""
    step_ms: float
    passes_ms: float
    phases_ms: dict[str, float]
    """Call -> its time; "zero_grad" last."""
    gaps_ms: float
    """What of the step is in no piece of it: on a GPU, what it waits for the host."""
    optimizer_ms: float
    """The sum of the phases."""
    overhead_percent: float
    """Of the step over so many times the pass of the base optimizer alone."""
    optimizer_percent: float
    """Of the optimizer over the same."""
    launches: int | None

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        return f"{self.algorithm}, {self.implementation}"


def rows(timed: Sequence[Timed]) -> list[Row]:
    """Return the figures of all that have taken a step; the base optimizer alone is the first of ``timed``."""
    measured = [it for it in timed if it.laps]
    return [_row(it, pass_ms(timed[0])) for it in measured] if timed and timed[0].laps else []


def pass_ms(base: Timed) -> float:
    """Return the median of a pass, in milliseconds; NaN before the first step."""
    return 1e3 * base.median(lambda laps: laps.pieces[0]) if base.laps else float("nan")


def _row(timed: Timed, base_pass: float) -> Row:
    passes, whole = len(timed.calls), timed.whole is not None
    step = 1e3 * timed.median(lambda laps: laps.wall)
    phases = {
        call: 1e3 * timed.median(lambda laps, i=i: laps.pieces[i])  # type: ignore[misc]
        for call, i in zip((*timed.calls, "zero_grad"), [*range(1, 2 * passes, 2), 2 * passes], strict=True)
        if not whole
    }
    floor = passes * base_pass
    optimizer = sum(phases.values())
    return Row(
        algorithm=timed.algorithm,
        implementation=timed.implementation,
        passes=passes,
        steps=len(timed.laps),
        step_ms=step,
        passes_ms=1e3 * timed.median(lambda laps: sum(laps.pieces if whole else laps.pieces[: 2 * passes : 2])),
        phases_ms=phases,
        gaps_ms=1e3 * timed.median(lambda laps: max(0.0, laps.wall - sum(laps.pieces))),
        optimizer_ms=optimizer,
        overhead_percent=100 * (step / floor - 1),
        optimizer_percent=100 * optimizer / floor,
        launches=timed.launches,
    )
