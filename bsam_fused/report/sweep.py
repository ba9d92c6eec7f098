"""The optimizers' own time and memory against the number of parameters: the first tensors of a network, more and more.

Needs torch alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median

import torch

from bsam_fused.report.clock import Clock
from bsam_fused.report.contestant import Shapes, after_two_steps, coefficients
from bsam_fused.report.implementations import ALGORITHMS, Base, implementations

SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1)
"""Of the network's elements."""
APART = 1.5
"""How many times the elements of the size before, at least."""
SECONDS = 1.0
"""For an implementation and a size."""
MOST = 20
"""Steps of each."""


@dataclass(frozen=True)
class Point:
    """An implementation on some of a network's tensors."""

    algorithm: str
    implementation: str
    tensors: int
    elements: int
    optimizer_ms: float
    """Of a step: the median."""
    gb_per_s: float
    """What a step must move, over its time."""
    extra_mb: float
    """Peak memory beside parameters, gradients and the base optimizer's own."""


def sizes(shapes: Shapes) -> list[int]:
    """Return numbers of tensors to measure: as many as hold each share of the elements, the whole network last."""
    held = list(accumulate(map(math.prod, shapes)))
    found = [len(shapes)]
    for share in sorted(SHARES, reverse=True):
        tensors = bisect_left(held, share * held[-1]) + 1
        if APART * held[tensors - 1] <= held[found[0] - 1]:
            found.insert(0, tensors)
    return found


def sweep(shapes: Shapes, algorithms: Sequence[str], base: Base, clock: Clock, dtype: torch.dtype) -> Iterator[Point]:
    """Yield what each implementation takes on more and more of the tensors; those that cannot be had are left out.

    One at a time: the largest network's buffers are then held by one implementation alone.
    """
    for tensors in sizes(shapes):
        curvatures = coefficients(shapes[:tensors], dtype, clock.device)
        elements = sum(math.prod(shape) for shape in shapes[:tensors])
        base_step = partial(after_two_steps, partial(base.build, fused=True), ("step",), curvatures)
        of_base = clock.peak_bytes(base_step)[1]
        for name in algorithms:
            algorithm = ALGORITHMS[name]
            for implementation, build in implementations(algorithm, base, clock.device.type).items():
                try:
                    contestant, peak = clock.peak_bytes(partial(after_two_steps, build, algorithm.calls, curvatures))
                except Exception:  # `timing` has said why
                    continue
                seconds: list[float] = []
                while not seconds or (sum(seconds) < SECONDS and len(seconds) < MOST):
                    seconds.append(sum(times.wall for times in clock.times(contestant.step)))
                moved = algorithm.moves(base) * elements * curvatures[0].element_size()
                yield Point(
                    algorithm.name,
                    implementation,
                    tensors,
                    elements,
                    1e3 * median(seconds),
                    1e-9 * moved / median(seconds),
                    1e-6 * (peak - of_base),
                )
