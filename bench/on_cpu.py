"""Whole steps on a CPU: every implementation of a case, side by side, against the copy's bandwidth."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import steps
from bench.cases import Case
from bench.deadline import Deadline
from bench.figures import Figure, judged, spread, verdict
from bsam_fused.report.clock import Copy, HostClock
from bsam_fused.report.implementations import REFERENCE

SUBJECT = "cpp"
"""The implementation that the targets are about."""
THREADS = 2
"""Of torch, in all figures."""
CLEARING = 2
"""Copies before the one that counts: the first has to write back up to all of the caches, and may take five times as
long."""
AFTER_SMALL = 5
"""Copies that count for a small case, all of them after its repetitions."""
READY_SECONDS = 600.0
"""For all implementations of a case to get ready; one may take half of what is left."""


class Side(NamedTuple):
    """What was measured of a case."""

    case: Case
    found: steps.Found
    host: steps.Found
    """The same on as many tensors of one element each: what a step costs the host."""
    bytes_a_second: float
    """Of the copy, in the same repetitions, once it has written back what others left in the caches."""


def measure(case: Case, seconds: float = READY_SECONDS) -> Side:
    """Measure a case; small ones without copies in between, which would empty their caches."""
    clock = HostClock()
    copy, copies = Copy(clock), []

    def between() -> None:
        copies.append([copy.seconds() for _ in range(1 + CLEARING)][-1])

    found = steps.measure(case, clock, Deadline(seconds), between=(lambda: None) if case.small else between)
    for _ in range(AFTER_SMALL if case.small else 0):
        between()
    host = found if case.small else steps.measure(_of_ones(case, found), clock, Deadline(seconds))
    return Side(case, found, host, copy.bytes / median(copies))


def _of_ones(case: Case, found: steps.Found) -> Case:
    """Return the case on as many tensors of one element each, for those that were measured."""
    builds = {name: case.builds[name] for name in steps.measured_of(found)}
    return replace(case, shapes=((1,),) * len(case.shapes), builds=builds)


def rows(side: Side) -> dict[str, dict[str, Any]]:
    """Return, of each implementation that was measured, its row of the table, for JSON."""
    case, found, host, rate = side
    measured = steps.measured_of(found)
    return {
        name: {
            "step_ms": spread(own.seconds()),
            "phases_ms": {
                call: 1e3 * median(times.wall for times in phase)
                for call, phase in zip(case.algorithm.calls, zip(*own.steps, strict=True), strict=True)
            },
            "mbytes_to_move": case.moves * case.elements * torch.float32.itemsize / 1e6,
            "copy_percent": 100 * steps.budget(case, rate) / own.median(),
            "host_us": 1e6 * ones.median() if isinstance(ones := host[name], steps.Measured) else None,
            "extra_memory_n": own.extra,
            "loops_ratio": measured[REFERENCE].median() / own.median(),
        }
        for name, own in measured.items()
    }


def figures(side: Side, subject: str = SUBJECT) -> list[Figure]:
    """Return the numbers that have targets."""
    case, found, _, rate = side
    measured = steps.measured_of(found)
    if subject not in measured:
        return []
    own = measured[subject]
    result = steps.ratios(found, subject)
    if case.small:
        result.append(Figure(f"{subject}, a tensor", 1e6 * own.median() / len(case.shapes), "µs"))
    else:
        result.append(Figure(f"{subject} / byte budget", own.median() / steps.budget(case, rate)))
    return [*result, Figure(f"extra memory of {subject}", own.extra, "N")]


def report(side: Side) -> dict[str, Any]:
    """Return everything found out about a case, for JSON."""
    absent = {name: each.why for name, each in side.found.items() if isinstance(each, steps.Absent)}
    return {
        "tensors": len(side.case.shapes),
        "elements": side.case.elements,
        "moves": side.case.moves,
        "repetitions": side.case.repeat,
        "copy_gb_per_s": side.bytes_a_second / 1e9,
        "rows": rows(side),
        "absent": absent,
        "figures": judged(side.case.targets, figures(side)),
    }


def told(side: Side) -> str:
    """Return the figures and their verdicts as text."""
    return "\n".join(
        f"  {it.name:<28}{it.value:>9.2f} {it.unit:<3}{verdict(side.case.targets, it)}".rstrip() for it in figures(side)
    )
