"""SAM over plain SGD on a parameter of more than 2^31 elements, with one after it: every element is the formula's.

python -m tests.reliability.huge [--backend cpp|cuda-on-host]   13 GB: weights, gradients and saved weights in bfloat16
"""

import argparse
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import host_cuda

from bsam_fused import SAM
from tests.reliability.records import recorded

NUMEL = (2**31 + 12_345, 1_000)
"""Of the parameters: what lies beyond 2^31 has offsets of more than 32 bits, in the one and in the flat buffers."""
LR, RHO = 0.5, 5_000.0  # ‖g‖ is about 27,000: every element moves by a fifth of its gradient
CHUNK = 2**24
PERIOD = 8191
"""Of what is filled in: 2^31 is no multiple of it, so that an offset that wraps around finds other numbers."""


def pattern(begin, end, seed):
    """Numbers in [-1, 1) that tell places, and tensors of other seeds, apart."""
    places = torch.arange(begin, end) * (40_503 + 2 * seed)
    return ((places % PERIOD).double() / (PERIOD / 2) - 1).bfloat16()


def chunks(numel):
    """Where each begins and ends."""
    return ((begin, min(begin + CHUNK, numel)) for begin in range(0, numel, CHUNK))


def fill(t, seed):
    for begin, end in chunks(t.numel()):
        t[begin:end] = pattern(begin, end, seed)
    return t


def give(params, seed):
    """Gradients of this seed."""
    for p in params:
        p.grad = fill(torch.empty_like(p, requires_grad=False), seed)


def assert_are(params, right):
    """Every weight is right(begin, end), to bfloat16's (stochastic) rounding."""
    for p in params:
        for begin, end in chunks(p.numel()):
            torch.testing.assert_close(p.detach()[begin:end].double(), right(begin, end), rtol=2**-7, atol=2**-9)


def norm(numels, seed):
    """‖g‖, in float64."""
    return sum(pattern(*chunk, seed).double().square().sum() for n in numels for chunk in chunks(n)).sqrt()


def a_step(backend, numels=NUMEL):
    """Ascend along gradients of seed 1, from weights of seed 0; update by those of seed 2."""
    params = [nn.Parameter(fill(torch.empty(n, dtype=torch.bfloat16), 0)) for n in numels]
    optimizer = SAM(params, torch.optim.SGD, lr=LR, rho=RHO, backend=backend)
    give(params, 1)
    optimizer.ascend()
    scale = RHO / norm(numels, 1)
    assert_are(params, lambda *at: pattern(*at, 0).double() + scale * pattern(*at, 1).double())
    give(params, 2)
    optimizer.step()
    assert_are(params, lambda *at: pattern(*at, 0).double() - LR * pattern(*at, 2).double())


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.huge", description=__doc__)
    parser.add_argument("--backend", choices=["cpp", "cuda-on-host"], default="cpp")
    backend = parser.parse_args().backend
    with pytest.MonkeyPatch.context() as patch, recorded(f"more than 2^31 elements, {backend}") as record:
        if backend == "cuda-on-host":
            host_cuda.stand_in(patch)
        a_step(backend.removesuffix("-on-host"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record.figures = {"elements": sum(NUMEL), "peak GB": round(peak / 1e9, 1)}
    print(record.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
