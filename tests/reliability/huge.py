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


def seed_of(what, i):
    """Of the i-th parameter's weights (0), or of its gradient in the first or second pass: no other one's."""
    return what + 3 * i


def give(params, what):
    """Every parameter its gradient."""
    for i, p in enumerate(params):
        p.grad = fill(torch.empty_like(p, requires_grad=False), seed_of(what, i))


def assert_are(params, right):
    """Every weight is right(its w, g, g_max), to bfloat16's (stochastic) rounding."""
    for i, p in enumerate(params):
        for begin, end in chunks(p.numel()):
            expected = right(*(pattern(begin, end, seed_of(what, i)).double() for what in range(3)))
            torch.testing.assert_close(p.detach()[begin:end].double(), expected, rtol=2**-7, atol=2**-9)


def norm(numels):
    """‖g‖, in float64."""
    patterns = (pattern(*chunk, seed_of(1, i)) for i, n in enumerate(numels) for chunk in chunks(n))
    return sum(g.double().square().sum() for g in patterns).sqrt()


def a_step(backend, numels=NUMEL):
    """w + ρ g / ‖g‖, then w − lr g_max."""
    params = [nn.Parameter(fill(torch.empty(n, dtype=torch.bfloat16), seed_of(0, i))) for i, n in enumerate(numels)]
    optimizer = SAM(params, torch.optim.SGD, lr=LR, rho=RHO, backend=backend)
    give(params, 1)
    optimizer.ascend()
    scale = RHO / norm(numels)
    assert_are(params, lambda w, g, g_max: w + scale * g)
    give(params, 2)
    optimizer.step()
    assert_are(params, lambda w, g, g_max: w - LR * g_max)


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
