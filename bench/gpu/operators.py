"""Every operator alone, against the bytes that it must move."""

from __future__ import annotations

import math
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.cases import Shapes
from bench.figures import Figure, judged, spread
from bench.gpu.cases import OPERATOR_TARGETS
from bench.gpu.clock import Clock
from bench.operators import OPERATORS, OperatorRun

REPEAT = 20
WARM_UP = 3


def measure(backend: str, shapes: Shapes, clock: Clock, copy: float) -> dict[str, Any]:
    """Return what a backend's operators take on parameters of these shapes, for JSON.

    Args:
        backend: its name.
        shapes: of the parameters.
        clock: what measures.
        copy: the copy's bytes a second.

    Raises:
        RuntimeError: the backend cannot be had here, with the reason.
    """
    run = OperatorRun(backend, shapes, clock.device)
    n_bytes = sum(map(math.prod, shapes)) * torch.float32.itemsize
    operators, figures = {}, []
    for name, (_, moves) in OPERATORS.items():
        seconds = _seconds(run, name, clock)
        rate = moves * n_bytes / median(seconds)
        operators[name] = {"moves": moves, "gpu_ms": spread(seconds), "gb_per_s": rate / 1e9}
        figures.append(Figure(name, 100 * rate / copy, "%"))
    return {"operators": operators, "figures": judged(OPERATOR_TARGETS, figures)}


def _seconds(run: OperatorRun, name: str, clock: Clock) -> list[float]:
    seconds = []
    for _ in range(WARM_UP + REPEAT):
        run.come_to(name)
        seconds.append(clock.busy(partial(run.run, name)))
    return seconds[WARM_UP:]
