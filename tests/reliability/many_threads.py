"""Steps of the whole family in parallel regions, two models in threads of their own: what ThreadSanitizer looks at.

python -m tests.reliability.many_threads
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from members import MEMBERS

THREADS, STEPS = 4, 3
NUMEL = 200_000
"""Of a parameter: several blocks for each thread."""
BASES = {"SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"lr": 0.1})}


def train(member, base, dtype):
    """A few steps on the C++ backend."""
    params = [nn.Parameter(torch.linspace(0.5, 2, NUMEL).to(dtype)) for _ in range(3)]
    kind, options = BASES[base]
    optimizer = MEMBERS[member].build(params, kind, backend="cpp", **options)

    def closure():
        loss = sum(p.cos().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    assert all(p.isfinite().all() for p in params)


def main():
    torch.set_num_threads(THREADS)
    for member in MEMBERS:
        for base in BASES:
            with ThreadPoolExecutor(2) as pool:
                [*pool.map(partial(train, member, base), (torch.float32, torch.bfloat16))]
            print(member, base, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
