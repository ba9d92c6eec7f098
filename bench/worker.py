"""Takes steps for `bench.compare`, with whatever bsam_fused is on PYTHONPATH, through its public face alone.

python bench/worker.py DEVICE BACKEND

Each line of stdin is JSON: [algorithm, base, shapes, dtype] begins anew, "step" takes a step. Answers are seconds, on a
GPU the device's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bsam_fused

# Of this checkout and not of the one that is measured, which may have none.
sys.path.append(str(Path(__file__).parents[1] / "bsam_fused" / "report"))
from contestant import Contestant, coefficients

THREADS = 2
AHEAD = 2_000_000
"""Cycles for which a GPU is held up, so that the host has launched all of a phase by then."""
ALGORITHMS: dict[str, Any] = {
    "sam": (bsam_fused.SAM, ("ascend", "step")),
    "bsam": (bsam_fused.BSAM, ("ascend", "descend", "step")),
}
BASES: dict[str, Any] = {
    "sgd": {"base_optimizer": torch.optim.SGD, "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"base_optimizer": torch.optim.AdamW, "lr": 1e-3, "weight_decay": 1e-2},
}


def contestant(device: str, backend: str, algorithm: str, base: str, shapes: list[list[int]], dtype: str) -> Contestant:
    """Return an optimizer of the package on parameters of these shapes."""
    kind, calls = ALGORITHMS[algorithm]

    def build(params: list[Tensor]) -> Any:
        return kind(params, rho=0.05, backend=backend, **BASES[base])

    return Contestant(build, calls, coefficients([tuple(shape) for shape in shapes], getattr(torch, dtype), device))


def seconds_of(phase: Any) -> float:
    """Return how long a phase takes."""
    begin = time.perf_counter()
    phase()
    return time.perf_counter() - begin


def device_seconds_of(phase: Any) -> float:
    """Return how long a phase takes the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    phase()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def main(device: str, backend: str) -> None:
    """Answer lines until there are no more."""
    measure = device_seconds_of if device == "cuda" else seconds_of
    torch.set_num_threads(THREADS)
    current: Contestant | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if question == "step":
            assert current is not None
            print(sum(current.step(measure)), flush=True)
        else:
            current = contestant(device, backend, *question)
            print(0.0, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
