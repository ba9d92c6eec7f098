"""Whole steps of every implementation of an algorithm, side by side."""

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

from bench.contestant import Contestant, coefficients
from bench.figures import Figure, Target, judged, spread
from bench.gpu.cases import GPUCase
from bench.gpu.clock import AHEAD, Clock
from bench.gpu.deadline import Deadline, OutOfTime

WARM_UP = 3
"""Repetitions that are thrown away."""
REFERENCE = "loops"
"""The implementation whose weights all others must have."""


@dataclass
class Measured:
    """What was measured of an implementation: repetition -> seconds a phase (`bench.gpu.clock` defines them)."""

    extra: float
    """Peak memory beside the base optimizer's, in N elements."""
    gpu: list[Sequence[float]] = field(default_factory=list)
    host: list[Sequence[float]] = field(default_factory=list)
    wall: list[Sequence[float]] = field(default_factory=list)


class Absent(NamedTuple):
    """Why an implementation was not measured."""

    why: str
    wrong: bool = False
    """Whether it is there, and gives other weights."""


def measure(case: GPUCase, clock: Clock, deadline: Deadline) -> dict[str, Measured | Absent]:
    """Measure a case: implementations take turns within each repetition, so that noise hits all alike.

    Raises:
        RuntimeError: the reference cannot be had.
    """
    with _no_collector():
        curvatures = coefficients(case.shapes, device=clock.device)
        ready, absent = _start(case, clock, curvatures, deadline)
        for repetition in range(-WARM_UP, case.repeat):
            for contestant, measured in ready.values():
                host, wall = zip(*contestant.step(clock.host_and_wall), strict=True)
                gpu = contestant.step(partial(clock.busy, ahead=AHEAD + 1.5 * max(host)))
                if repetition >= 0:
                    measured.gpu.append(gpu)
                    measured.host.append(host)
                    measured.wall.append(wall)
    return {name: absent[name] if name in absent else ready[name][1] for name in case.algorithm.implementations}


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running within what is timed or weighed; before, it runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def launches(case: GPUCase, clock: Clock, names: Iterable[str]) -> dict[str, dict[str, int | None]]:
    """Return the launches of each phase of implementations that were measured.

    Only after all timing: a profiler that was on once may slow launches from then on.
    """
    curvatures, calls = coefficients(case.shapes, device=clock.device), case.algorithm.calls
    counts = {}
    for name in names:
        contestant = _two_steps(case.algorithm.implementations[name], calls, curvatures)
        counts[name] = dict(zip(calls, contestant.step(clock.launches), strict=True))
    return counts


def _start(
    case: GPUCase, clock: Clock, curvatures: Sequence[Tensor], deadline: Deadline
) -> tuple[dict[str, tuple[Contestant, Measured]], dict[str, Absent]]:
    """Return the implementations that can run and agree, two steps on; and the others."""
    calls, bytes_of_n = case.algorithm.calls, case.elements * curvatures[0].element_size()
    of_base = clock.peak_bytes(partial(_two_steps, case.algorithm.base, ("step",), curvatures))[1]
    ready: dict[str, tuple[Contestant, Measured]] = {}
    absent: dict[str, Absent] = {}
    for name, build in case.algorithm.implementations.items():
        two_steps = partial(_two_steps, build, calls, curvatures)
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


def _two_steps(build: Callable[[list[Tensor]], Any], calls: Sequence[str], curvatures: Sequence[Tensor]) -> Contestant:
    contestant = Contestant(build, calls, curvatures)
    contestant.step()
    contestant.step()
    return contestant


def _disagreements(params: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Return whose weights differ from the reference's, and how."""
    if REFERENCE not in params:
        raise RuntimeError(f"{REFERENCE} did not run: nothing to compare with")
    disagreements = {}
    for name, own in params.items():
        try:
            torch.testing.assert_close(own, params[REFERENCE])
        except AssertionError as error:
            disagreements[name] = f"other weights than {REFERENCE}: {' '.join(str(error).split())}"
    return disagreements


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def figures(case: GPUCase, found: Mapping[str, Measured | Absent], subject: str, copy: float) -> list[Figure]:
    """Return the numbers that matter of ``subject``, from medians; ``copy``: the copy's bytes a second."""
    measured = {name: each for name, each in found.items() if isinstance(each, Measured)}
    if subject not in measured:
        return []
    own = measured[subject]
    floor = case.algorithm.moves * case.elements * torch.float32.itemsize / copy
    result = [
        Figure("GPU time", 1e6 * _of_step(own.gpu), "µs"),
        Figure("host time", 1e6 * _of_step(own.host), "µs"),
        Figure("wall time", 1e6 * _of_step(own.wall), "µs"),
        Figure("of copy bandwidth", 100 * floor / _of_step(own.gpu), "%"),
        Figure("extra memory", own.extra, "N"),
    ]
    for what, seconds in (("GPU time", "gpu"), ("wall time", "wall")):
        mine = _of_step(getattr(own, seconds))
        result += [
            Figure(f"{what}, {name} / {subject}", _of_step(getattr(other, seconds)) / mine)
            for name, other in measured.items()
            if name != subject
        ]
    return result


def _of_step(phases: Sequence[Sequence[float]]) -> float:
    return median(map(sum, phases))


def report(
    case: GPUCase, found: Mapping[str, Measured | Absent], figures: Sequence[Figure], targets: Mapping[str, Target]
) -> dict[str, Any]:
    """Return everything found out about a case, for JSON."""
    calls = case.algorithm.calls
    return {
        "tensors": len(case.shapes),
        "elements": case.elements,
        "moves": case.algorithm.moves,
        "repetitions": case.repeat,
        "implementations": {
            name: each._asdict() if isinstance(each, Absent) else _as_json(calls, each) for name, each in found.items()
        },
        "figures": judged(targets, figures),
    }


def _as_json(calls: Sequence[str], measured: Measured) -> dict[str, Any]:
    def times(phases: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
        by_call = {call: spread(seconds) for call, *seconds in zip(calls, *phases, strict=True)}
        return {"all": spread([sum(step) for step in phases]), **by_call}

    return {
        "gpu_ms": times(measured.gpu),
        "host_ms": times(measured.host),
        "wall_ms": times(measured.wall),
        "extra_memory_n": measured.extra,
    }
