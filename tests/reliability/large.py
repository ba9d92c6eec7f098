"""Many tensors, whose steps are right, and large ones, whose steps take the memory that docs/design.md says."""

import time
from functools import partial

import torch
from torch import nn

from bsam_fused import SAM

RHO, LR = 0.05, 0.1
STATED = {"SGD": 2, "SAM": 3}
"""Weights and gradients, and SAM's `saved`: "Extra memory: N for SAM" (docs/design.md), in N of the weights' dtype."""
MARGIN = 0.02
"""Of N: activations, and what the allocator holds. A matrix product may hold another layer's weights."""


def many_tensors(count):
    """SAM over so many tensors is the paper's, in float64: w - lr g(w + rho g / ‖g‖) for the loss Σ c w⁴ / 4."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(1 + i % 7, dtype=torch.float64)) for i in range(count)]
    curvatures = [torch.rand_like(p) for p in params]
    expected = [p.detach().clone() for p in params]
    optimizer = SAM(params, torch.optim.SGD, lr=LR, rho=RHO)
    seconds = []

    def closure():
        for p, c in zip(params, curvatures):
            p.grad = c * p.detach() ** 3
        return torch.zeros(())

    for _ in range(3):
        begin = time.monotonic()
        optimizer.step(closure)
        seconds.append(time.monotonic() - begin)
        g = [c * w**3 for w, c in zip(expected, curvatures)]
        norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
        w_max = [w + RHO * x / norm for w, x in zip(expected, g)]
        expected = [w - LR * c * m**3 for w, m, c in zip(expected, w_max, curvatures)]
    for p, w in zip(params, expected):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-13)
    return {"tensors": count, "seconds_a_step": round(min(seconds), 3)}


def peak_resident():
    """Return the most bytes of memory that this process has had in use so far."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def train_layers(layers, method, width, steps):
    """Train a bfloat16 model; return the seconds that each step took."""
    torch.manual_seed(1)
    weights = [nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)]
    with torch.no_grad():
        for layer in weights:
            layer.weight.mul_(3**0.5)  # what goes through keeps its length, and gradients do, however many layers
    model, x = nn.Sequential(*weights), torch.randn(2, width, dtype=torch.bfloat16)
    kinds = {"SGD": torch.optim.SGD, "SAM": partial(SAM, rho=RHO)}
    optimizer = kinds[method](model.parameters(), lr=1e-3)
    first, seconds = model[0].weight.detach()[:8, :8].clone(), []

    def closure():
        optimizer.zero_grad()
        loss = model(x).float().square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        begin = time.monotonic()
        optimizer.step(closure)
        seconds.append(time.monotonic() - begin)
    assert not torch.equal(first, model[0].weight.detach()[:8, :8]), "the steps moved nothing"
    return seconds


def large_model(layers, method, width=4096, steps=2):
    """Steps of a large model: the most memory that they take, over what the process had before, is as stated."""
    train_layers(1, method, 256, 1)  # code and threads come into memory with the first step
    before = peak_resident()
    seconds = train_layers(layers, method, width, steps)
    parameters = layers * width**2
    n = (peak_resident() - before) / (2 * parameters)
    found = {
        "parameters": parameters,
        "weights_gbytes": round(2e-9 * parameters, 3),
        "peak_gbytes": round(1e-9 * (peak_resident() - before), 3),
        "peak_in_weights": round(n, 3),
        "stated_in_weights": STATED[method],
        "seconds_a_step": round(min(seconds), 2),
    }
    assert n <= STATED[method] + 1 / layers + MARGIN, f"more memory than is stated: {found}"
    return found
