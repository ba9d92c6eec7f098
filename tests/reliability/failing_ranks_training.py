"""A training on several ranks, in one step of which one rank does something else: what `failing_ranks` looks at."""

import datetime
import math
import os
import signal
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused import BSAM, SAM
from bsam_fused.distributed import local

from .kills_training import digest

STEPS = 6
BATCH = 16
MEETING = datetime.timedelta(seconds=60)
"""In which ranks find each other, whatever the group's timeout is then."""
SGD = {"lr": 0.1, "momentum": 0.9}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 101), nn.Tanh(), nn.Linear(101, 7), nn.Tanh(), nn.Linear(7, 1)).double()


class Setup(NamedTuple):
    """How ranks train together."""

    kind: type
    options: dict
    distribute: object
    """Makes a network one of all ranks."""
    reduces: bool = False
    """Whether the loop itself averages the gradients."""


def sharded(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


SETUPS = {
    "by hand": Setup(SAM, {}, lambda model: model, reduces=True),
    "DDP": Setup(BSAM, {"rho_min": 0.03}, DDP),
    "DDP, last": Setup(SAM, {"sync": "last"}, DDP),
    "DDP, last, BSAM": Setup(BSAM, {"rho_min": 0.03, "sync": "last"}, DDP),
    "FSDP2": Setup(SAM, {}, sharded),
}
FAULTS = {
    "killed": "",
    "slow": "",
    "too slow": "",
    "NaN": "",
    "other gradients": "the last pass's gradient",
    "a missing gradient": "which parameters have gradients",
    "not reduced": "",
}
"""Each with what those say who raise."""
_ANYWHERE = {"killed": "raise", "slow": "go on", "too slow": "raise", "NaN": "skip"}
_SOMEWHERE = {
    "other gradients": {"by hand": "part", "DDP": "part", "DDP, last": "raise", "DDP, last, BSAM": "stay together"},
    "a missing gradient": {
        **{"by hand": "part", "DDP": "part"},
        **{"DDP, last": "raise", "DDP, last, BSAM": "raise", "FSDP2": "raise"},
    },
    "not reduced": {"DDP, last": "raise", "FSDP2": "raise"},
}


def expected(fault, setup):
    """Return how the other ranks take a fault; None where it is none, or torch's alone.

    They "part" where the ranks tell each other gradients alone (docs/distributed.md): whoever changes these on one rank
    after they were averaged has two trainings, as with torch's own optimizers.
    """
    return _ANYWHERE.get(fault) or _SOMEWHERE[fault].get(setup)


class Fault(NamedTuple):
    """What one rank does in one pass of one step, which is neither the first nor the last one."""

    name: str
    rank: int
    step: int
    at: int
    """The pass."""
    moment: str
    """In the pass, where it makes a difference."""

    @classmethod
    def at_random(cls, name, setup, ranks, rng):
        passes = len(SETUPS[setup].kind._calls)
        # What one rank has in an earlier pass moves its own perturbation alone: the last one is averaged.
        last = name in {"other gradients", "not reduced"} or expected(name, setup) == "part"
        at = passes - 1 if last else rng.randrange(passes)
        return cls(name, rng.randrange(ranks), rng.randrange(1, STEPS - 1), at, rng.choice(MOMENTS))


MOMENTS = "before forward", "before backward", "after backward"


class Passes:
    """The closure of a rank's steps, and what is wrong with it."""

    def __init__(self, say, setup, model, params, rank, ranks, timeout, fault):
        self.say, self.setup, self.model, self.params = say, setup, model, params
        self.rank, self.ranks, self.timeout, self.fault = rank, ranks, timeout, fault
        self.step = self.at = 0

    def begin(self, step):
        self.step, self.at = step, 0
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(BATCH, 1, generator=generator, dtype=torch.float64)
        self.x, self.y = (t[self.rank :: self.ranks] for t in (x, y))

    @property
    def wrong(self):
        """The name of the fault, in its pass."""
        fault = self.fault
        here = fault and (fault.rank, fault.step, fault.at) == (self.rank, self.step, self.at)
        return fault.name if here else None

    def __call__(self):
        self._moment("before forward")
        x = self.x * math.nan if self.wrong == "NaN" else self.x
        with self._unreduced() if self.wrong == "not reduced" else nullcontext():
            loss = nn.functional.mse_loss(self.model(x), self.y)
            self._moment("before backward")
            loss.backward()
        if self.setup.reduces:
            for p in self.params:
                dist.all_reduce(p.grad)
                p.grad /= self.ranks
        self._moment("after backward")
        self._change_gradients()
        self.at += 1
        return loss

    def _unreduced(self):
        if isinstance(self.model, DDP):
            return self.model.no_sync()
        self.model.set_requires_gradient_sync(False)
        return nullcontext()

    def _moment(self, now):
        if not self.wrong or self.fault.moment != now:
            return
        self.say(("fault", time.monotonic()))
        if self.wrong == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({"slow": 0.5 * self.timeout, "too slow": self.timeout + 2}.get(self.wrong, 0))

    def _change_gradients(self):
        if self.wrong == "other gradients":
            for p in self.params:
                p.grad = p.grad + 1  # not only of another length, which BSAM does not go by
        elif self.wrong == "a missing gradient":
            self.params[0].grad = None


def train(say, setup, rank, ranks, store, timeout, fault):
    """Make some steps. Says ("state", hash) at first and after each; or ("error", when, step, hash, words), and stops.

    Before it does what is wrong it says ("fault", when); and at last ("over", skipped steps). Then it waits to be
    killed, so that nobody hears that it has ended.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=MEETING)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout))
    how = SETUPS[setup]
    model = how.distribute(network())
    params = list(model.parameters())
    optimizer = how.kind(params, rho=0.1, model=model, **how.options, **SGD)
    passes = Passes(say, how, model, params, rank, ranks, timeout, fault)
    say(("state", left(optimizer, params)))
    for step in range(STEPS):
        passes.begin(step)
        try:
            if not fault or (fault.name, fault.step) != ("left out", step):
                optimizer.step(passes)
        except RuntimeError as error:
            now = time.monotonic()
            optimizer.restore()
            say(("error", now, step, left(optimizer, params), str(error)))
            break
        say(("state", left(optimizer, params)))
    say(("over", optimizer.skipped_steps))
    signal.pause()


def left(optimizer, params):
    """Return a hash of this rank's weights and state."""
    state = [{key: local(value) for key, value in optimizer.state.get(p, {}).items()} for p in params]
    return digest([[local(p) for p in params], state])
