"""What `model=` adds to a step: µs a buffer, of a network of small BatchNorm layers.

    python -m bench.buffers

A step's passes assign gradients and touch no buffer, so that only the optimizer's work is timed; with the model and
without it in turns, medians of the differences.
"""

import statistics
import time

import torch
from torch import nn

from bsam_fused import BSAM, SAM

LAYERS, CHANNELS, STEPS = 20, 64, 400  # a ResNet-18's


def network():
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(CHANNELS))]
    return nn.Sequential(*layers)


def timed(step):
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e6


def by_closure(optimizer, run_pass):
    return lambda: optimizer.step(run_pass)


def by_hand(optimizer, run_pass):
    def step():
        for call in optimizer._calls:
            run_pass()
            getattr(optimizer, call)()

    return step


def added(kind, backend, how):
    """µs a buffer: medians of steps with the model and without it, in turns."""
    steps = []
    for guarded in (False, True):
        net = network()
        params = list(net.parameters())
        grads = [torch.ones_like(p) for p in params]

        def run_pass(params=params, grads=grads):
            for p, g in zip(params, grads, strict=True):
                p.grad = g

        optimizer = kind(params, lr=0.0, rho=0.0, model=net if guarded else None, backend=backend)
        for group in optimizer.param_groups:
            group["lr"] = 1e-9
        steps.append(how(optimizer, run_pass))
    for step in steps:
        step()
    times = [[timed(step) for step in steps] for _ in range(STEPS)]
    plain, guarded = (statistics.median(column) for column in zip(*times, strict=True))
    return (guarded - plain) / len(list(network().buffers()))


def main():
    torch.set_num_threads(1)
    print("µs a buffer and step      closure   by hand")
    for backend in ("cpp", "torch"):
        for kind in (SAM, BSAM):
            figures = [added(kind, backend, how) for how in (by_closure, by_hand)]
            print(f"{backend:6} {kind.__name__:8}        " + "".join(f"{figure:10.2f}" for figure in figures))


if __name__ == "__main__":
    main()
