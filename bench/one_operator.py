"""Every operator alone, against the bytes that it must move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.operators import OPERATORS, OperatorRun
from bsam_fused.report.clock import Clock, copy_bandwidth
from bsam_fused.report.contestant import Shapes

REPEAT, REPEAT_ON_CPU = 20, 7
WARM_UP = 2
ON_CPU = ("cpp", "torch")

Measured = dict[str, dict[str, Any]]
"""Operator -> what it moves, its seconds, its rate and that rate's share of the copy's bandwidth."""


def measure(backend: str, shapes: Shapes, clock: Clock, copy: float, dtype: torch.dtype = torch.float32) -> Measured:
    """Return what a backend's operators take on parameters of these shapes.

    Args:
        backend: its name.
        shapes: of the parameters.
        clock: what measures.
        copy: the copy's bytes a second.
        dtype: of the parameters.

    Raises:
        RuntimeError: the backend cannot be had here, with the reason.
    """
    return _measure([backend], shapes, clock, copy, REPEAT, dtype)[backend]


def on_cpu(shapes: Shapes, clock: Clock) -> dict[str, Measured]:
    """Return the same of both backends on a CPU, measured in turns."""
    return _measure(ON_CPU, shapes, clock, copy_bandwidth(clock, copies=5), REPEAT_ON_CPU)


def _measure(
    backends: Sequence[str],
    shapes: Shapes,
    clock: Clock,
    copy: float,
    repeat: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Measured]:
    runs = {backend: OperatorRun(backend, shapes, clock.device, dtype) for backend in backends}
    n_bytes = sum(map(math.prod, shapes)) * dtype.itemsize
    found: dict[str, Measured] = {backend: {} for backend in backends}
    for name, (_, moves) in OPERATORS.items():
        for backend, seconds in _seconds(runs, name, clock, repeat).items():
            rate = moves * n_bytes / median(seconds)
            found[backend][name] = {
                "moves": moves,
                "seconds": seconds,
                "gb_per_s": rate / 1e9,
                "copy_percent": 100 * rate / copy,
            }
    return found


def _seconds(runs: dict[str, OperatorRun], name: str, clock: Clock, repeat: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {backend: [] for backend in runs}
    for _ in range(WARM_UP + repeat):
        for backend, run in runs.items():
            run.come_to(name)
            seconds[backend].append(clock.busy(partial(run.run, name)))
    return {backend: each[WARM_UP:] for backend, each in seconds.items()}
