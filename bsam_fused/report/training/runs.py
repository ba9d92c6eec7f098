"""One training run, and the row that it gives."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from bsam_fused import BSAM, SAM
from bsam_fused.report.machine import this_machine
from bsam_fused.report.training.tasks import TASKS, Digits

AGAIN = "again.jsonl"
"""Where a row's command writes: in a file that has the row already nothing would be made."""


class Optimizer(NamedTuple):
    """How an optimizer is built of a network and options, and its passes a step."""

    build: Callable[[nn.Module, dict[str, Any]], Any]
    passes: int


OPTIMIZERS = {
    "SGD": Optimizer(lambda network, options: torch.optim.SGD(network.parameters(), **options), 1),
    "SAM": Optimizer(lambda network, options: SAM(network.parameters(), model=network, **options), 2),
    "BSAM": Optimizer(lambda network, options: BSAM(network.parameters(), model=network, **options), 3),
}


@dataclass(frozen=True)
class Run:
    """What is to be trained."""

    task: str
    """One of `TASKS`."""
    optimizer: str
    """One of `OPTIMIZERS`."""
    rho: float | None
    """The radius ρ, None of SGD, which has none."""
    seed: int
    """Of the labels that are replaced, the weights that training begins with, and the order of the images."""
    epochs: int

    @property
    def repeated_by(self) -> str:
        """What makes this run again."""
        options: list[tuple[str, object]] = [
            ("--task", self.task),
            ("--optimizer", self.optimizer),
            ("--seed", self.seed),
        ]
        options += [("--epochs", self.epochs), *([] if self.rho is None else [("--rho", self.rho)])]
        words = [str(word) for option in options for word in option]
        return shlex.join(["python", "-m", "bsam_fused.report.training", *words, "--out", AGAIN])


@dataclass(frozen=True)
class Row(Run):
    """What a run gave, and where."""

    test_accuracy_percent: float
    training_loss: float
    """At w, the mean over the last epoch's steps; an incomplete batch is left out of each."""
    steps: int
    passes: int
    """Forward and backward, in all."""
    seconds: float
    """Of training alone."""
    backend: str
    command: str
    threads: int
    cpu: str
    torch: str
    commit: str | None
    date: str

    @property
    def run(self) -> Run:
        """What was to be trained."""
        return Run(**{field.name: getattr(self, field.name) for field in fields(Run)})


def plan(
    tasks: Iterable[str], radii: Mapping[str, Sequence[float | None]], seeds: Iterable[int], epochs: int | None = None
) -> list[Run]:
    """Return tasks × optimizers × radii × seeds, a seed of each first, and what is named twice once.

    Args:
        tasks: names, of `TASKS`.
        radii: optimizer -> radii.
        seeds: of each.
        epochs: of each run; None: the task's own.
    """
    runs = (
        Run(task, optimizer, rho, seed, epochs or TASKS[task].epochs)
        for task in tasks
        for seed in seeds
        for optimizer, rhos in radii.items()
        for rho in rhos
    )
    return list(dict.fromkeys(runs))


def train(run: Run) -> Row:
    """Train in this process; return the row."""
    task, how = TASKS[run.task], OPTIMIZERS[run.optimizer]
    data = task.data(run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        network = task.network()
        optimizer = how.build(network, task.base if run.rho is None else {"rho": run.rho, **task.base})
        begin = time.perf_counter()
        losses = _losses(run, data, network, optimizer)
        seconds = time.perf_counter() - begin
    machine, epoch = this_machine(), len(losses) // run.epochs
    return Row(
        **vars(run),
        test_accuracy_percent=_accuracy(network, data),
        training_loss=fmean(losses[-epoch:]),
        steps=len(losses),
        passes=how.passes * len(losses),
        seconds=seconds,
        backend=getattr(optimizer, "backends", {"cpu": "torch.optim"})["cpu"].split()[0],
        command=run.repeated_by,
        threads=torch.get_num_threads(),
        cpu=machine.cpu,
        torch=machine.torch,
        commit=machine.git_commit,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _losses(run: Run, data: Digits, network: nn.Module, optimizer: Any) -> list[float]:
    """Train; return each step's loss at w."""
    task = TASKS[run.task]
    batches = len(data.y) // task.batch_size
    schedule = CosineAnnealingLR(optimizer, run.epochs * batches)
    shuffle = torch.Generator().manual_seed(run.seed)
    losses = []
    for _ in range(run.epochs):
        for batch in torch.randperm(len(data.y), generator=shuffle).split(task.batch_size)[:batches]:

            def closure(x: Tensor = data.x[batch], y: Tensor = data.y[batch]) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(network(x), y)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            schedule.step()
    return losses


@torch.no_grad()
def _accuracy(network: nn.Module, data: Digits) -> float:
    """Return how many test images the network names rightly, in percent."""
    return 100 * (network.eval()(data.x_test).argmax(1) == data.y_test).double().mean().item()
