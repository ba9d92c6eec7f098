"""A training that writes a checkpoint after every step, as docs/recipes.md has it: what `kills` kills."""

import datetime
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused import BSAM, SAM, FriendlySAM, LookSAM
from bsam_fused.schedules import RandomSteps

BATCH, FEATURES, CLASSES = 16, 32, 10
GROUP_TIMEOUT = datetime.timedelta(seconds=20)
CHECKPOINT, HALF = "checkpoint.pt", "checkpoint.pt.half"


class Case(NamedTuple):
    """An optimizer whose checkpoint has something that the others' have not."""

    kind: type
    base: type
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    sync: str = "every"
    """On several ranks."""


MOMENTUM = {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}
CASES = {
    "SAM": Case(SAM, torch.optim.SGD, MOMENTUM, sync="last"),
    "BSAM": Case(BSAM, torch.optim.AdamW, {"lr": 0.01, "rho_min": 0.03}, sync="last"),
    "LookSAM": Case(LookSAM, torch.optim.SGD, {**MOMENTUM, "k": 3}),
    "FriendlySAM": Case(FriendlySAM, torch.optim.Adam, {"lr": 0.01}),
    "SAM, bfloat16": Case(SAM, torch.optim.SGD, {**MOMENTUM, "seed": 7}, torch.bfloat16),
    "BSAM, bfloat16": Case(BSAM, torch.optim.AdamW, {"lr": 0.01, "master_weights": True}, torch.bfloat16, "last"),
}


class Training:
    """A model and all that moves beside it from step to step, random numbers of the batches and of dropout among it."""

    def __init__(self, case, ranks, steps):
        torch.manual_seed(1)
        norm = nn.BatchNorm1d if ranks == 1 else nn.LayerNorm  # running statistics are each rank's own
        layers = [nn.Linear(FEATURES, 128), norm(128), nn.Tanh(), nn.Dropout(0.2), nn.Linear(128, CLASSES)]
        self.inner = nn.Sequential(*layers).to(case.dtype)
        self.model = self.inner if ranks == 1 else DDP(self.inner)
        sync = case.sync if ranks > 1 else "every"
        params = self.model.parameters()
        optimizer = case.kind(params, case.base, rho=0.1, model=self.model, sync=sync, **case.options)
        self.parts = {
            "model": self.inner,
            "optimizer": optimizer,
            "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
            "thrift": RandomSteps(optimizer, 0.8),
        }

    def step(self, share):
        """One over a random batch, of which every rank takes its share."""
        x = torch.randn(BATCH, FEATURES)[share].to(next(self.inner.parameters()))
        y = torch.randint(CLASSES, (BATCH,))[share]

        def closure():
            loss = nn.functional.cross_entropy(self.model(x).float(), y)
            loss.backward()
            return loss

        for name in ("optimizer", "cosine", "thrift"):
            self.parts[name].step(*[closure] if name == "optimizer" else [])

    def state(self):
        return {**{name: part.state_dict() for name, part in self.parts.items()}, "random": torch.get_rng_state()}

    def save(self, folder, step):
        """Under another name first, so that the last one is whole whenever this one is killed."""
        torch.save({**self.state(), "step": step}, folder / HALF)
        os.replace(folder / HALF, folder / CHECKPOINT)

    def load(self, folder):
        """Return the step that it was written after."""
        saved = torch.load(folder / CHECKPOINT, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        return saved["step"]


def digest(state):
    """Return a hash of all bits of a nested state."""
    return hashlib.sha256(b"".join(_pieces(state))).hexdigest()


def _pieces(state):
    if isinstance(state, torch.Tensor):
        yield f"{state.dtype}{tuple(state.shape)}".encode()
        yield state.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield f"{key}:".encode()
            yield from _pieces(state[key])
    elif isinstance(state, list | tuple):
        for item in state:
            yield from _pieces(item)
    else:
        yield f"{state!r};".encode()


def train(say, folder, case, rank, ranks, store, steps, saves):
    """Train on to so many steps from what the folder has.

    Says ("state", step, hash) at first and after every step, and ("saved", step) when its checkpoint is in place.
    """
    folder = Path(folder)
    if ranks > 1:
        where = f"file://{store}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=GROUP_TIMEOUT)
    training = Training(CASES[case], ranks, steps)
    first = training.load(folder) if (folder / CHECKPOINT).exists() else 0
    say(("state", first, digest(training.state())))
    for step in range(first + 1, steps + 1):
        training.step(slice(rank, None, ranks))
        say(("state", step, digest(training.state())))
        if saves and rank == 0:
            training.save(folder, step)
            say(("saved", step))
