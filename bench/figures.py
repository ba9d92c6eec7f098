"""Figures, what they shall be, and how far measurements spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A number of the report."""

    name: str
    value: float
    unit: str = ""


class Target(NamedTuple):
    """What a figure shall be."""

    relation: str
    """">=" or "<="."""
    bound: float

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:.2f}"

    def met(self, value: float) -> bool:
        """Return whether ``value``, to the two decimals that are printed, is within the bound."""
        value = round(value, 2)
        return value >= self.bound if self.relation == ">=" else value <= self.bound


def at_least(bound: float) -> Target:
    """Return the target >= bound."""
    return Target(">=", bound)


def at_most(bound: float) -> Target:
    """Return the target <= bound."""
    return Target("<=", bound)


def verdict(targets: Mapping[str, Target], figure: Figure) -> str:
    """Return the figure's target and whether it is met or missed; nothing where it has none."""
    target = targets.get(figure.name)
    return "" if target is None else f"{target}  {'met' if target.met(figure.value) else 'missed'}"


def judged(targets: Mapping[str, Target], figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """Return figures with their verdicts, for JSON."""
    return [{**figure._asdict(), "target": verdict(targets, figure)} for figure in figures]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the quartiles, in ms."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {"p25": 1e3 * low, "median": 1e3 * middle, "p75": 1e3 * high}
