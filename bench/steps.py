"""Whole steps of every implementation of algorithms, side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import Case
from bench.deadline import Deadline, OutOfTime
from bench.figures import Figure, Target, judged, spread
from bsam_fused.report.clock import Clock, Times
from bsam_fused.report.contestant import Contestant, after_two_steps, coefficients
from bsam_fused.report.implementations import REFERENCE, reason

WARM_UP = 1
"""Repetitions that are thrown away, after the two steps in which buffers come to be."""

TOLERANCES = {torch.bfloat16: (2**-5, 2**-9)}
"""dtype -> how far apart weights may be, relatively and absolutely; torch's own where there is none.

Two steps that are rounded stochastically and two to nearest: some units in the last place, of up to 2^-7. As they move
weights by less than one, this shows gross errors alone: `bench.gpu.smoke` holds 16 bits to more.
"""


@dataclass
class Measured:
    """What was measured of an implementation."""

    extra: float
    """Peak memory beside the base optimizer's, in N elements."""
    steps: list[list[Times]] = field(default_factory=list)
    """Repetition -> times of each phase."""

    def seconds(self, what: str = "wall") -> list[float]:
        """Return the seconds of each repetition: the sum over its phases of "device", "host" or "wall"."""
        return [sum(getattr(phase, what) for phase in step) for step in self.steps]

    def median(self, what: str = "wall") -> float:
        """Return the median of `seconds`."""
        return median(self.seconds(what))


class Absent(NamedTuple):
    """Why an implementation was not measured."""

    why: str
    wrong: bool = False
    """Whether it is there, and gives other weights."""


Found = Mapping[str, Measured | Absent]


def measure(
    case: Case,
    clock: Clock,
    deadline: Deadline,
    *,
    warm_up: int = WARM_UP,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Measured | Absent]:
    """Measure a case, as `measure_all` does."""
    return measure_all([case], clock, deadline, warm_up=warm_up, between=between)[0]


def measure_all(
    cases: Sequence[Case],
    clock: Clock,
    deadline: Deadline,
    *,
    warm_up: int = WARM_UP,
    between: Callable[[], object] = lambda: None,
) -> list[dict[str, Measured | Absent]]:
    """Measure cases: all implementations take turns within each repetition, so that noise hits all alike.

    Args:
        cases: what to measure, all of the same shapes, dtype and repetitions.
        clock: what measures; its device is where.
        deadline: by when all must be ready.
        warm_up: repetitions to throw away.
        between: is called once a repetition.

    Raises:
        RuntimeError: the reference cannot be had.
    """
    first = cases[0]
    with no_collector():
        curvatures = coefficients(first.shapes, first.dtype, clock.device)
        started = [_start(case, clock, curvatures, deadline) for case in cases]
        contestants = [each for ready, _ in started for each in ready.values()]
        for repetition in range(-warm_up, first.repeat):
            for contestant, measured in contestants:
                times = clock.times(contestant.step)
                if repetition >= 0:
                    measured.steps.append(times)
            between()
    return [
        {name: absent[name] if name in absent else ready[name][1] for name in case.builds}
        for case, (ready, absent) in zip(cases, started, strict=True)
    ]


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running within what is timed or weighed; before, it runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def launches(case: Case, clock: Clock, names: Iterable[str]) -> dict[str, dict[str, int | None]]:
    """Return the launches of each phase of implementations that were measured.

    In a process that times nothing: a profiler that was on once may slow launches from then on.
    """
    curvatures, calls = coefficients(case.shapes, case.dtype, clock.device), case.algorithm.calls
    counts = {}
    for name in names:
        contestant = after_two_steps(case.builds[name], calls, curvatures)
        counts[name] = dict(zip(calls, contestant.step(clock.launches), strict=True))
    return counts


def _start(
    case: Case, clock: Clock, curvatures: Sequence[Tensor], deadline: Deadline
) -> tuple[dict[str, tuple[Contestant, Measured]], dict[str, Absent]]:
    """Return the implementations that can run and agree, two steps on; and the others."""
    calls, bytes_of_n = case.algorithm.calls, case.elements * curvatures[0].element_size()
    base = partial(case.base.build, fused=True)
    of_base = clock.peak_bytes(partial(after_two_steps, base, ("step",), curvatures))[1]
    ready: dict[str, tuple[Contestant, Measured]] = {}
    absent: dict[str, Absent] = {}
    for name, build in case.builds.items():
        two_steps = partial(after_two_steps, build, calls, curvatures)
        try:
            with deadline.half():
                two_steps()  # compiles and loads what there is to compile and load
                contestant, peak = clock.peak_bytes(two_steps)
        except (Exception, OutOfTime) as error:
            absent[name] = Absent(reason(error))
        else:
            ready[name] = contestant, Measured((peak - of_base) / bytes_of_n)
    for name, why in _disagreements({name: contestant.params for name, (contestant, _) in ready.items()}).items():
        absent[name] = Absent(why, wrong=True)
        del ready[name]
    return ready, absent


def _disagreements(params: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Return whose weights differ from the reference's, and how."""
    if REFERENCE not in params:
        raise RuntimeError(f"{REFERENCE} did not run: nothing to compare with")
    rtol, atol = TOLERANCES.get(params[REFERENCE][0].dtype, (None, None))
    disagreements = {}
    for name, own in params.items():
        try:
            torch.testing.assert_close(own, params[REFERENCE], rtol=rtol, atol=atol)
        except AssertionError as error:
            disagreements[name] = f"other weights than {REFERENCE}: {' '.join(str(error).split())}"
    return disagreements


def measured_of(found: Found) -> dict[str, Measured]:
    """Return those that were measured."""
    return {name: each for name, each in found.items() if isinstance(each, Measured)}


def ratios(found: Found, subject: str, what: str = "wall", prefix: str = "") -> list[Figure]:
    """Return the time of every other implementation over that of ``subject``, which was measured."""
    measured = measured_of(found)
    own = measured[subject].median(what)
    others = {name: each for name, each in measured.items() if name != subject}
    return [Figure(f"{prefix}{name} / {subject}", each.median(what) / own) for name, each in others.items()]


def budget(case: Case, bytes_a_second: float) -> float:
    """Return the seconds in which the copy moves as many bytes as a step must."""
    return case.moves * case.elements * case.dtype.itemsize / bytes_a_second


def report(case: Case, found: Found, figures: Sequence[Figure], targets: Mapping[str, Target]) -> dict[str, Any]:
    """Return everything found out about a case, for JSON."""
    calls = case.algorithm.calls
    return {
        "tensors": len(case.shapes),
        "elements": case.elements,
        "moves": case.moves,
        "dtype": str(case.dtype).removeprefix("torch."),
        "repetitions": case.repeat,
        "implementations": {
            name: each._asdict() if isinstance(each, Absent) else _as_json(calls, each) for name, each in found.items()
        },
        "figures": judged(targets, figures),
    }


def _as_json(calls: Sequence[str], measured: Measured) -> dict[str, Any]:
    def times(what: str) -> dict[str, dict[str, float]]:
        by_call = {call: spread([getattr(step[i], what) for step in measured.steps]) for i, call in enumerate(calls)}
        return {"all": spread(measured.seconds(what)), **by_call}

    kinds = {"gpu_ms": "device", "host_ms": "host", "wall_ms": "wall"}
    return {**{name: times(what) for name, what in kinds.items()}, "extra_memory_n": measured.extra}
