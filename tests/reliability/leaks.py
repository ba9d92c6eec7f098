"""Memory that stays flat: over many steps, where gradients come and go, and where optimizers do."""

import copy
import ctypes
import gc
import io
import os
import random
import time

import torch
from torch import nn

from bsam_fused import BSAM, SAM, FriendlySAM, LookSAM

SMALLEST = 16
"""Bytes: the smallest Python object. Memory that grows by less a step grows by no object a step, and by no tensor."""
JITTER = 2**19
"""Bytes by which a process's memory differs between two looks at it anyhow; over few steps it is more than SMALLEST."""
WARM_UP = 0.2
"""The share of the steps in which caches fill, ours, torch's and the allocator's."""
LOOKS = 50
CYCLE = 20
"""Steps in which everything happens once, copies and checkpoints among it: looks are whole cycles apart."""

OPTIMIZERS = {
    "SAM": lambda params, **more: SAM(params, torch.optim.SGD, lr=0.01, momentum=0.9, **more),
    "BSAM": lambda params, **more: BSAM(params, torch.optim.AdamW, lr=0.001, rho=0.05, **more),
    "LookSAM": lambda params, **more: LookSAM(params, torch.optim.Adam, lr=0.001, k=3, **more),
    "FriendlySAM": lambda params, **more: FriendlySAM(params, torch.optim.SGD, lr=0.01, **more),
    "SAM, RMSprop": lambda params, **more: SAM(params, torch.optim.RMSprop, lr=0.001, **more),
}
"""One of each kind of state: fused with one buffer, and two; a history; a base that makes its own step."""


def resident():
    """Return the bytes of memory that this process has in use; what it has freed is given back before."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Looks at the process's memory some times in so many steps; what there was before is nobody's leak."""

    def __init__(self, steps):
        self.steps, self.every = steps, CYCLE * max(1, steps // (LOOKS * CYCLE))
        self.at, self.bytes, self.tensors, self.objects = [], [], [], []
        gc.collect()
        gc.freeze()  # looking at half a million objects takes a second
        self.begin = time.monotonic()

    def look(self, step):
        """To be called after each step, where it began from; looks after some of them."""
        if (step + 1) % self.every or step < WARM_UP * self.steps:
            return
        gc.collect()
        everything = gc.get_objects()
        self.at.append(step)
        self.tensors.append(sum(issubclass(type(each), torch.Tensor) for each in everything))
        self.objects.append(len(everything))
        del everything
        self.bytes.append(resident())

    def figures(self):
        """Return what was seen.

        Raises:
            AssertionError: memory grows, or the number of tensors does.
        """
        slope, bound = fitted_slope(self.at, self.bytes), max(SMALLEST, JITTER / (self.at[-1] - self.at[0]))
        grown = self.tensors[-1] - self.tensors[0]
        found = {
            "steps": self.steps,
            "seconds": round(time.monotonic() - self.begin, 1),
            "bytes_a_step": round(slope, 2),
            "bound_bytes_a_step": round(bound, 2),
            "mbytes": round(self.bytes[-1] / 1e6, 1),
            "tensors": self.tensors[-1],
            "tensors_more": grown,
            "objects_more": self.objects[-1] - self.objects[0],
        }
        assert grown == 0, f"tensors become more: {found}"
        assert fitted_slope(self.at, self.objects) < 0.01, f"objects become more: {found}"
        assert slope <= bound, f"memory grows: {found}"
        return found


def fitted_slope(xs, ys):
    """Return the slope of the line that is nearest to points, in the least squares' sense."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


def closure_of(model):
    x = torch.randn(4, 8)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return closure


def saved_and_loaded(*parts):
    """Every part's state, written, read, and loaded into the same part."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for part, state in zip(parts, torch.load(file, weights_only=True)):
        part.load_state_dict(state)


def many_steps(steps, name="SAM"):
    """One optimizer; every tenth step it is copied or, in turn, saved and loaded."""
    model = network()
    optimizer, watch = OPTIMIZERS[name](model.parameters(), model=model), Watch(steps)
    for step in range(steps):
        optimizer.step(closure_of(model))
        if step % CYCLE == 9:
            copy.deepcopy((model, optimizer))[1].step(lambda: None)
        elif step % CYCLE == 19:
            saved_and_loaded(model, optimizer)
        watch.look(step)
    return watch.figures()


class Branches(nn.Module):
    """Of which each pass goes through some."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(8, 4) for _ in range(6))
        self.taken = [0]

    def forward(self, x):
        return sum(self.branches[i](x) for i in self.taken)


def changing_gradients(steps, name="SAM", seed=1):
    """Every step other parameters have gradients, every fifth others are frozen; in a cycle's last one all have."""
    torch.manual_seed(1)
    model, rng = Branches(), random.Random(seed)
    optimizer, watch = OPTIMIZERS[name](model.parameters(), model=model), Watch(steps)
    for step in range(steps):
        whole = step % CYCLE == CYCLE - 1
        model.taken = range(6) if whole else rng.sample(range(6), rng.randint(1, 5))
        if step % 5 == 0 or whole:
            for branch in model.branches:
                branch.requires_grad_(whole or rng.random() < 0.7)
        model.branches[model.taken[0]].requires_grad_(True)
        optimizer.step(closure_of(model))
        watch.look(step)
    return watch.figures()


def come_and_go(optimizers):
    """A new optimizer each time, around the same parameters: trained, copied, saved; or left within a step."""
    model, names, watch = network(), [*OPTIMIZERS], Watch(optimizers)
    for i in range(optimizers):
        optimizer = OPTIMIZERS[names[i % len(names)]](model.parameters(), model=model)
        for _ in range(3):
            optimizer.step(closure_of(model))
        copy.deepcopy(optimizer)
        saved_and_loaded(optimizer)
        if i % 2:
            closure_of(model)()
            optimizer.ascend()
            optimizer.restore()
        model.zero_grad()
        watch.look(i)
    return watch.figures()
