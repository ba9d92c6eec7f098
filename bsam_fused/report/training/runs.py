"""One training run, and the row that it gives."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from functools import partial
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from bsam_fused.report.machine import this_machine
from bsam_fused.report.training import after
from bsam_fused.report.training.methods import METHODS, LossFunction, training_loss
from bsam_fused.report.training.tasks import TASKS, Data, Part

AGAIN = "again.jsonl"
"""Where a row's command writes: in a file that has the row already nothing would be made."""

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Run:
    """What is to be trained, and what the network is then asked."""

    task: str
    """One of `TASKS`."""
    optimizer: str
    """One of `METHODS`."""
    rho: float | None
    """The radius ρ, None of the base optimizer, which has none."""
    seed: int
    """Of the data that is drawn, the weights that training begins with, and the order of the examples."""
    epochs: int
    split: Split

    @property
    def repeated_by(self) -> str:
        """What makes this run again."""
        options: list[tuple[str, object]] = [
            ("--task", self.task),
            ("--optimizer", self.optimizer),
            ("--seed", self.seed),
            ("--epochs", self.epochs),
            ("--split", self.split),
        ]
        options += [] if self.rho is None else [("--rho", self.rho)]
        words = [str(word) for option in options for word in option]
        return shlex.join(["python", "-m", "bsam_fused.report.training", *words, "--out", AGAIN])


@dataclass(frozen=True)
class Row(Run):
    """What a run gave, and where."""

    accuracy_percent: float
    """Of the split's labels, how many are named rightly."""
    training_loss: float
    """Cross-entropy at w, the mean over the last epoch's steps; an incomplete batch is left out of each."""
    chance_loss: float
    """What knowing nothing but how often each label comes gives on the training data."""
    quantized_percent: dict[str, float]
    """`accuracy_percent` with weights of so many bits, bits -> percent; {} where the split is for validation."""
    sharpness: dict[str, float]
    """What `after.sharpness` returns; {} likewise, or where a pass over the training data is not finite."""
    steps: int
    passes: int
    """Forward and backward, in all."""
    seconds: float
    """Of the processor, of training alone."""
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

    @property
    def diverged(self) -> bool:
        """Whether it ended with a loss near chance, as of a network that knows nothing of its training data."""
        return not self.training_loss < NEAR_CHANCE * self.chance_loss


NEAR_CHANCE = 0.97
"""Times the loss of chance. With 60 % of ten labels random, the best that ignores which are wrong has 0.82."""


def plan(
    tasks: Iterable[str],
    radii: Mapping[str, Sequence[float | None]],
    seeds: Iterable[int],
    epochs: int | None = None,
    split: Split = "test",
) -> list[Run]:
    """Return tasks × optimizers × radii × seeds, a seed of each first, and what is named twice once.

    Args:
        tasks: names, of `TASKS`.
        radii: optimizer -> radii.
        seeds: of each.
        epochs: of each run; None: the task's own.
        split: what the networks are asked.
    """
    runs = (
        Run(task, optimizer, rho, seed, epochs or TASKS[task].epochs, split)
        for task in tasks
        for seed in seeds
        for optimizer, rhos in radii.items()
        for rho in rhos
    )
    return list(dict.fromkeys(runs))


class Trained(NamedTuple):
    """A network that was trained, on what, and how it went."""

    network: nn.Module
    data: Data
    losses: list[float]
    """Of each step, at w."""
    passes: int
    seconds: float
    backend: str


def trained(run: Run) -> Trained:
    """Train in this process; no epochs leave the network as it begins."""
    task, data = TASKS[run.task], TASKS[run.task].data(run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        network = task.network()
        optimizer = METHODS[run.optimizer].build(network, task.base, run.rho or 0.0)
        begin = time.process_time()
        losses, passes = _losses(run, data.training, network, optimizer)
        seconds = time.process_time() - begin
    backend = getattr(optimizer, "backends", {"cpu": "torch.optim"})["cpu"].split()[0]
    return Trained(network, data, losses, passes, seconds, backend)


def train(run: Run) -> Row:
    """Train in this process; return the row."""
    network, data, losses, passes, seconds, backend = trained(run)
    tested = run.split == "test"
    part: Part = getattr(data, run.split)
    machine, epoch = this_machine(), len(losses) // run.epochs
    return Row(
        **vars(run),
        accuracy_percent=after.accuracy_percent(network, part),
        training_loss=fmean(losses[-epoch:]),
        chance_loss=_entropy(data.training.y),
        quantized_percent=after.quantized_percent(network, part) if tested else {},
        sharpness=after.sharpness(network, data.training) if tested else {},
        steps=len(losses),
        passes=passes,
        seconds=seconds,
        backend=backend,
        command=run.repeated_by,
        threads=torch.get_num_threads(),
        cpu=machine.cpu,
        torch=machine.torch,
        commit=machine.git_commit,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _losses(run: Run, training: Part, network: nn.Module, optimizer: Any) -> tuple[list[float], int]:
    """Train; return each step's loss at w, and how many passes there were."""
    task, method = TASKS[run.task], METHODS[run.optimizer]
    batches = len(training.y) // task.batch_size
    steps = run.epochs * batches
    stepped: list[Any] = [CosineAnnealingLR(optimizer, steps)]
    stepped += [method.policy(optimizer, steps)] if method.policy else []
    shuffle = torch.Generator().manual_seed(run.seed)
    losses: list[float] = []
    passes, first = 0, True

    def closure(batch: Tensor, loss_fn: LossFunction = cross_entropy) -> Tensor:
        nonlocal passes, first
        optimizer.zero_grad()
        output = network(training.x[batch])
        loss = training_loss(output, training.y[batch], loss_fn)
        loss.backward()
        if first:  # at w; what is climbed there may be another loss
            losses.append(training_loss(output.detach(), training.y[batch]).item())
        passes, first = passes + 1, False
        return loss

    for _ in range(run.epochs):
        for batch in torch.randperm(len(training.y), generator=shuffle).split(task.batch_size)[:batches]:
            climbed = {"ascent_closure": partial(closure, batch, method.ascent)} if method.ascent else {}
            first = True
            optimizer.step(partial(closure, batch), **climbed)
            for each in stepped:
                each.step()
    return losses, passes


def _entropy(y: Tensor) -> float:
    """Return the entropy of labels, in nats."""
    share = y.flatten().bincount().double() / y.numel()
    return torch.special.entr(share).sum().item()
