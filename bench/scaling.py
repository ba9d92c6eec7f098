"""How a step's cost grows with the number of tensors and of elements: `python -m bench.scaling`.

BSAM over SGD with momentum on the cpp backend, float32. The time of a step is fitted as a + b · tensors, and as
a · elements^b.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import linear_regression, median
from typing import Any

import torch

from bench.figures import Figure, at_most, judged
from bench.on_cpu import SUBJECT, THREADS
from bsam_fused.report.clock import Clock, HostClock
from bsam_fused.report.contestant import Shapes, after_two_steps, coefficients
from bsam_fused.report.implementations import ALGORITHMS, BASES, implementations

TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)
"""Of `EACH` elements, on one thread: what is measured is the host's time."""
EACH = 64
ELEMENTS = (10**4, 10**5, 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
"""In one tensor."""
STREAMED = 10**7
"""Elements from which on nothing of a step stays in a cache, so that its cost can be seen to be linear."""
HELD = 7
"""Elements that a step holds at most, in N, with the gradients and what makes them."""
SPARE = 0.6
"""Of the memory that is available, what may be used."""
STEPS = 15
TARGETS = {
    "host time, a tensor": at_most(0.5),
    "exponent of elements, off 1 by": at_most(0.1),
}


def fitting(elements: Sequence[int]) -> list[int]:
    """Return the numbers of elements that this machine has the memory for."""
    return [n for n in elements if HELD * n * torch.float32.itemsize <= SPARE * _available()]


def _available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def step_seconds(shapes: Shapes, clock: Clock, steps: int = STEPS) -> float:
    """Return the median time of a step on parameters of these shapes."""
    algorithm = ALGORITHMS["bsam"]
    build = implementations(algorithm, BASES["sgd"], clock.device.type)[SUBJECT]
    contestant = after_two_steps(build, algorithm.calls, coefficients(shapes, device=clock.device))
    return median(sum(times.wall for times in clock.times(contestant.step)) for _ in range(steps))


def measure(tensors: Sequence[int] = TENSORS, elements: Sequence[int] = ELEMENTS) -> dict[str, Any]:
    """Return the times of both series and their fits, for JSON."""
    seconds = partial(step_seconds, clock=HostClock())
    with _one_thread():
        by_tensors = {n: 1e6 * seconds(((EACH,),) * n) for n in tensors}
    by_elements = {n: 1e6 * seconds(((n,),)) for n in fitting(elements)}
    slope, start = fit_line(by_tensors)
    exponent = fit_power({n: us for n, us in by_elements.items() if n >= STREAMED})
    figures = [Figure("host time, a tensor", slope, "µs"), Figure("host time, a step", start, "µs")]
    if exponent is not None:
        figures += [
            Figure("exponent of elements", exponent),
            Figure("exponent of elements, off 1 by", abs(exponent - 1)),
        ]
    return {
        "each": EACH,
        "by_tensors_us": by_tensors,
        "by_elements_us": by_elements,
        "left_out_elements": [n for n in elements if n not in by_elements],
        "figures": judged(TARGETS, figures),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_line(times: dict[int, float]) -> tuple[float, float]:
    """Return slope and start of the line through the times, each weighed by 1 / n², so that all sizes count alike."""
    # t / n = slope + start / n is a line in 1 / n, with all points' relative errors alike.
    start, slope = linear_regression([1 / n for n in times], [us / n for n, us in times.items()])
    return slope, start


def fit_power(times: dict[int, float]) -> float | None:
    """Return b of a · n^b; None for fewer than two sizes."""
    if len(times) < 2:
        return None
    return linear_regression(list(map(math.log, times)), list(map(math.log, times.values()))).slope


def told(found: dict[str, Any]) -> str:
    """Return the series and their fits as text."""
    lines = [f"{n:>13,} tensors of {EACH}: {us:12.1f} µs" for n, us in found["by_tensors_us"].items()]
    lines += [f"{n:>13,} elements: {us:18.1f} µs" for n, us in found["by_elements_us"].items()]
    lines += [f"{it['name']:<32}{it['value']:8.2f} {it['unit']:<3}{it['target']}" for it in found["figures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(told(measure()))
