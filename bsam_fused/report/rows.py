"""Timed steps in figures. Needs torch alone.

Of an implementation's steps the middle half counts, by the time of the whole step: what a busy machine did to the
others is left out, and the means of a step's pieces over the same steps add up to the step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from bsam_fused.report.clock import Laps
from bsam_fused.report.timing import Timed

ROUGH_PERCENT = 10
"""Where passes vary by more, times are rough."""
FEW = 4
"""Steps: quartiles of fewer say nothing of how they vary."""


@dataclass(frozen=True)
class Row:
    """One implementation's step: means over the middle half of its steps, in milliseconds.

    A spread is the distance between the quartiles of all steps: half of them lie within.
    """

    algorithm: str
    implementation: str
    passes: int
    """Forward and backward passes in a step."""
    steps: int
    """That were timed."""
    step_ms: float
    """The sum of passes, optimizer and gaps."""
    step_spread_ms: float
    passes_ms: float
    passes_spread_ms: float
    phases_ms: dict[str, float]
    """Call -> its time; "zero_grad" last. Empty where the step is in one piece, whose time counts as its passes'."""
    gaps_ms: float
    """What of the step is in no piece of it: on a GPU, what it waits for the host."""
    optimizer_ms: float
    """The sum of the phases."""
    optimizer_spread_ms: float
    overhead_percent: float
    """Of the step over so many times the pass of the base optimizer alone."""
    overhead_noise_percent: float
    """How far spreads could move it; where that is as far as it is from 0, it says nothing."""
    optimizer_percent: float
    """Of the optimizer over the same."""
    optimizer_noise_percent: float
    launches: int | None

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        return f"{self.algorithm}, {self.implementation}"

    @property
    def passes_vary_percent(self) -> float:
        """The spread of the passes over their time."""
        return 100 * self.passes_spread_ms / self.passes_ms

    @property
    def overhead_is_seen(self) -> bool:
        """Whether the step's overhead is larger than the noise."""
        return abs(self.overhead_percent) > self.overhead_noise_percent

    @property
    def optimizer_is_seen(self) -> bool:
        """Whether the optimizer's overhead is larger than the noise."""
        return self.optimizer_percent > self.optimizer_noise_percent


def rows(timed: Sequence[Timed]) -> list[Row]:
    """Return the figures of all that have taken a step; the base optimizer alone is the first of ``timed``."""
    if not timed or not timed[0].laps:
        return []
    base_passes = [1e3 * laps.pieces[0] for laps in timed[0].laps]
    return [_row(it, pass_ms(timed[0]), _spread(base_passes)) for it in timed if it.laps]


def pass_ms(base: Timed) -> float:
    """Return the time of a pass, in milliseconds; NaN before the first step."""
    return 1e3 * fmean(laps.pieces[0] for laps in _middle(base.laps)) if base.laps else float("nan")


def vary_percent(rows: Sequence[Row]) -> float:
    """Return by how much the passes of the worst row vary; 0 where no row has enough steps."""
    return max((row.passes_vary_percent for row in rows if row.steps >= FEW), default=0.0)


def _middle(laps: Sequence[Laps]) -> list[Laps]:
    """Return the middle half of the steps, by their time: at least one."""
    left_out = len(laps) // 4
    return sorted(laps, key=lambda it: it.wall)[left_out : len(laps) - left_out]


def _spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles; of one value itself, as nothing is known of its noise."""
    if len(values) == 1:
        return values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _row(timed: Timed, base_pass: float, base_spread: float) -> Row:
    passes, middle = len(timed.calls), _middle(timed.laps)
    phases = {call: 1e3 * fmean(laps.pieces[i] for laps in middle) for call, i in _phases(timed).items()}
    in_passes = 1e3 * fmean(_in_passes(timed, laps) for laps in middle)
    step, optimizer = 1e3 * fmean(laps.wall for laps in middle), sum(phases.values())
    step_spread = 1e3 * _spread([laps.wall for laps in timed.laps])
    optimizer_spread = 1e3 * _spread([sum(laps.pieces) - _in_passes(timed, laps) for laps in timed.laps])
    floor, floor_noise = passes * base_pass, base_spread / base_pass
    return Row(
        algorithm=timed.algorithm,
        implementation=timed.implementation,
        passes=passes,
        steps=len(timed.laps),
        step_ms=step,
        step_spread_ms=step_spread,
        passes_ms=in_passes,
        passes_spread_ms=1e3 * _spread([_in_passes(timed, laps) for laps in timed.laps]),
        phases_ms=phases,
        gaps_ms=step - in_passes - optimizer,
        optimizer_ms=optimizer,
        optimizer_spread_ms=optimizer_spread,
        overhead_percent=100 * (step / floor - 1),
        overhead_noise_percent=100 * (step_spread + step * floor_noise) / floor,
        optimizer_percent=100 * optimizer / floor,
        optimizer_noise_percent=100 * (optimizer_spread + optimizer * floor_noise) / floor,
        launches=timed.launches,
    )


def _phases(timed: Timed) -> dict[str, int]:
    """Return call -> which piece of a step it is; none where the step is one piece."""
    if timed.whole is not None:
        return {}
    passes = len(timed.calls)
    return dict(zip((*timed.calls, "zero_grad"), [*range(1, 2 * passes, 2), 2 * passes], strict=True))


def _in_passes(timed: Timed, laps: Laps) -> float:
    """Return the seconds of a step's passes; of a step in one piece all of them."""
    return sum(laps.pieces if timed.whole is not None else laps.pieces[: 2 * len(timed.calls) : 2])
