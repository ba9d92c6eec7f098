"""How a step's cost grows with the number of tensors and of elements: `python -m bench.scaling`.

BSAM over SGD with momentum on the cpp backend, float32: all of its three phases. With the number of tensors, it is held
against a step of torch's own fused optimizers; with that of elements, its time is fitted as a · elements^b.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor

from bench.figures import Figure, Target, at_most, judged, spread
from bench.on_cpu import SUBJECT, THREADS
from bsam_fused.report.clock import Clock, HostClock
from bsam_fused.report.contestant import Shapes, after_two_steps, coefficients
from bsam_fused.report.implementations import ALGORITHMS, BASES, implementations

TENSORS = (1, 10, 60, 200, 500, 2000, 10_000)
"""Of `EACH` elements, on one thread: what is measured is the host's time."""
EACH = 64
OWN = f"BSAM over SGD, {SUBJECT}, three phases"
HOST_BARS = {"torch's fused AdamW, one step": 10, "torch's fused SGD, one step": 60}
"""From how many tensors on a whole step of ours takes no more of the host's time than one of these."""
ELEMENTS = (10**4, 10**5, 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
"""In one tensor."""
STREAMED = 10**7
"""Elements from which on nothing of a step stays in a cache, so that its cost can be seen to be linear."""
HELD = 7
"""Elements that a step holds at most, in N, with the gradients and what makes them."""
SPARE = 0.6
"""Of the memory that is available, what may be used."""
STEPS = 15
HOST_STEPS = 60
TARGETS: dict[str, Target] = {"exponent of elements, off 1 by": at_most(0.1)}


def fitting(elements: Sequence[int]) -> list[int]:
    """Return the numbers of elements that this machine has the memory for."""
    return [n for n in elements if HELD * n * torch.float32.itemsize <= SPARE * _available()]


def _available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_seconds(count: int) -> dict[str, list[float]]:
    """Return the seconds of each one's steps on ``count`` small tensors, in turns.

    The gradients are made once and held, so that no phase frees one; what it sets to None is put back, untimed.
    """
    clock, curvatures = HostClock(), coefficients(((EACH,),) * count)
    builds: dict[str, tuple[Callable[[list[Tensor]], Any], Sequence[str]]] = {
        OWN: (implementations(ALGORITHMS["bsam"], BASES["sgd"], "cpu")[SUBJECT], ALGORITHMS["bsam"].calls)
    }
    for name, base in zip(HOST_BARS, ("adamw", "sgd"), strict=True):
        builds[name] = lambda params, base=base: BASES[base].build(params, fused=True), ("step",)
    ready = {}
    for name, (build, calls) in builds.items():
        params = [t.clone().requires_grad_() for t in curvatures]
        optimizer = build(params)
        ready[name] = params, [getattr(optimizer, call) for call in calls]
    found: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(2 + HOST_STEPS):
        for name, (params, phases) in ready.items():
            seconds = 0.0
            for phase in phases:
                for p, t in zip(params, curvatures, strict=True):
                    p.grad = t
                seconds += clock.busy(phase)
            found[name].append(seconds)
    return {name: each[2:] for name, each in found.items()}


def step_seconds(shapes: Shapes, clock: Clock, steps: int = STEPS) -> float:
    """Return the median time of a step on parameters of these shapes."""
    algorithm = ALGORITHMS["bsam"]
    build = implementations(algorithm, BASES["sgd"], clock.device.type)[SUBJECT]
    contestant = after_two_steps(build, algorithm.calls, coefficients(shapes, device=clock.device))
    return median(sum(times.wall for times in clock.times(contestant.step)) for _ in range(steps))


def measure(tensors: Sequence[int] = TENSORS, elements: Sequence[int] = ELEMENTS) -> dict[str, Any]:
    """Return the times of both series, ratios and fit, for JSON."""
    with _one_thread():
        by_tensors = {n: host_seconds(n) for n in tensors}
    by_elements = {n: 1e6 * step_seconds(((n,),), HostClock()) for n in fitting(elements)}
    targets, figures = dict(TARGETS), []
    for n, found in by_tensors.items():
        for name, least in HOST_BARS.items():
            figures.append(Figure(f"{n} tensors: BSAM / {name}", median(found[OWN]) / median(found[name])))
            if n >= least:
                targets[figures[-1].name] = at_most(1)
    exponent = fit_power({n: us for n, us in by_elements.items() if n >= STREAMED})
    if exponent is not None:
        figures += [
            Figure("exponent of elements", exponent),
            Figure("exponent of elements, off 1 by", abs(exponent - 1)),
        ]
    return {
        "each": EACH,
        "by_tensors_ms": {n: {name: spread(each) for name, each in found.items()} for n, found in by_tensors.items()},
        "by_elements_us": by_elements,
        "left_out_elements": [n for n in elements if n not in by_elements],
        "figures": judged(targets, figures),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_power(times: dict[int, float]) -> float | None:
    """Return b of a · n^b; None for fewer than two sizes."""
    if len(times) < 2:
        return None
    return linear_regression(list(map(math.log, times)), list(map(math.log, times.values()))).slope


def told(found: dict[str, Any]) -> str:
    """Return the series and their figures as text."""
    lines = [
        f"{n:>7,} tensors of {EACH}: {1e3 * ms['median']:10.1f} µs  {name}"
        for n, each in found["by_tensors_ms"].items()
        for name, ms in each.items()
    ]
    lines += [f"{n:>13,} elements: {us:12.1f} µs" for n, us in found["by_elements_us"].items()]
    lines += [f"{it['name']:<56}{it['value']:8.2f} {it['unit']:<3}{it['target']}" for it in found["figures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(told(measure()))
