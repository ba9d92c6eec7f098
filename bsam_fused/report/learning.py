"""Whether fused training learns what the papers' loops learn: a small network on handwritten digits, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import bsam_fused
from bsam_fused.report import loops
from bsam_fused.report.training.tasks import Digits

RTOL = 1e-6
"""How far losses may differ in float64, relative. Rounding was seen to leave 2e-13, a radius wrong by 1e-5: 3e-4."""


@dataclass(frozen=True)
class Recipe:
    """What every implementation does alike. The learning rate falls from ``lr`` to 0 by a cosine."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.05
    rho_min: float = 0.05
    seed: int = 0

    @property
    def base(self) -> dict[str, Any]:
        """The options of the base optimizer, torch.optim.SGD."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class Student:
    """A method, by whose code it runs, the calls of a step (one after each pass), and how it is built."""

    method: str
    kind: str
    calls: tuple[str, ...]
    build: Callable[[list[Tensor], Recipe], Any]

    @property
    def name(self) -> str:
        """What plots call it."""
        return f"{self.method}, {self.kind}"


def _sgd(params: list[Tensor], recipe: Recipe) -> torch.optim.SGD:
    return torch.optim.SGD(params, **recipe.base)


def _plain_sam(params: list[Tensor], recipe: Recipe) -> loops.PlainSAM:
    return loops.PlainSAM(params, _sgd(params, recipe), recipe.rho)


def _fused_sam(params: list[Tensor], recipe: Recipe) -> bsam_fused.SAM:
    return bsam_fused.SAM(params, rho=recipe.rho, **recipe.base)


def _plain_bsam(params: list[Tensor], recipe: Recipe) -> loops.PlainBSAM:
    return loops.PlainBSAM(params, _sgd(params, recipe), recipe.rho, recipe.rho_min)


def _fused_bsam(params: list[Tensor], recipe: Recipe) -> bsam_fused.BSAM:
    return bsam_fused.BSAM(params, rho=recipe.rho, rho_min=recipe.rho_min, **recipe.base)


SGD = Student("SGD", "torch.optim", ("step",), _sgd)
PLAIN_SAM = Student("SAM", "loops", loops.PlainSAM.calls, _plain_sam)
FUSED_SAM = Student("SAM", "fused", loops.PlainSAM.calls, _fused_sam)
PLAIN_BSAM = Student("BSAM", "loops", loops.PlainBSAM.calls, _plain_bsam)
FUSED_BSAM = Student("BSAM", "fused", loops.PlainBSAM.calls, _fused_bsam)
STUDENTS = (SGD, PLAIN_SAM, FUSED_SAM, PLAIN_BSAM, FUSED_BSAM)
"""After the first in pairs: the papers' loops, then the fused optimizer that has to give the same losses."""


def network(seed: int) -> nn.Sequential:
    """Return the network, float32, with weights that depend on ``seed`` alone. No kinks, so rounding grows slowly."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for channels, wider, stride in ((1, 8, 1), (8, 16, 2), (16, 32, 1), (32, 64, 2)):
            layers += [nn.Conv2d(channels, wider, 3, stride, padding=1), nn.Tanh()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


@dataclass
class Run:
    """A network in training: its optimizer, and for each step the loss at w."""

    student: Student
    network: nn.Module
    optimizer: Any
    losses: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        """Take one step by hand: all its passes, with the optimizer's calls between them.

        Args:
            x: images.
            y: labels.
            lr: the learning rate of this step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for call in self.student.calls:
            losses.append(nn.functional.cross_entropy(self.network(x), y))
            losses[-1].backward()
            getattr(self.optimizer, call)()
        self.optimizer.zero_grad()
        self.losses.append(losses[0].item())

    @torch.no_grad()
    def accuracy(self, data: Digits) -> float:
        """Return the share of test images that the network names rightly."""
        return (self.network(data.x_test).argmax(1) == data.y_test).double().mean().item()


def prepare(students: Sequence[Student], recipe: Recipe) -> list[Run]:
    """Return a run a student, all from the same float64 weights."""
    runs = []
    for student in students:
        net = network(recipe.seed).double()
        runs.append(Run(student, net, student.build(list(net.parameters()), recipe)))
    return runs


def train(runs: Sequence[Run], data: Digits, recipe: Recipe) -> Iterator[int]:
    """Train all runs, a step of each in turn. Incomplete batches are left out.

    Yields:
        The number of each step, once all runs have taken it.
    """
    per_epoch = steps(data, recipe) // recipe.epochs
    shuffle = torch.Generator().manual_seed(recipe.seed)
    for t in range(steps(data, recipe)):
        if t % per_epoch == 0:
            order = torch.randperm(len(data.y), generator=shuffle).split(recipe.batch_size)
        batch = order[t % per_epoch]
        for run in runs:
            run.step(data.x[batch], data.y[batch], cosine(recipe.lr, t, steps(data, recipe)))
        yield t


def steps(data: Digits, recipe: Recipe) -> int:
    """Return how many steps a run takes."""
    return recipe.epochs * (len(data.y) // recipe.batch_size)


def cosine(lr: float, t: int, total: int) -> float:
    """Return lr (1 + cos(π t / total)) / 2."""
    return lr * (1 + math.cos(math.pi * t / total)) / 2


# ---- what it gave


@dataclass(frozen=True)
class Comparison:
    """How far the losses of a method's fused and plain training are apart, relative, at the worst step."""

    method: str
    deviation: float
    agree: bool


@dataclass(frozen=True)
class Curve:
    """A run's losses, the mean of each epoch, and how many test images it then names rightly."""

    name: str
    epoch_losses: list[float]
    test_accuracy_percent: float


@dataclass(frozen=True)
class Learning:
    """What all runs gave."""

    recipe: Recipe
    steps: int
    training_images: int
    test_images: int
    curves: list[Curve]
    comparisons: list[Comparison]
    rtol: float = RTOL

    @property
    def agree(self) -> bool:
        """Whether fused and plain training gave the same losses, for every method."""
        return all(comparison.agree for comparison in self.comparisons)


def summary(runs: Sequence[Run], data: Digits, recipe: Recipe) -> Learning:
    """Return what finished runs of `STUDENTS`, or students in their order, gave."""
    return Learning(
        recipe=recipe,
        steps=steps(data, recipe),
        training_images=len(data.y),
        test_images=len(data.y_test),
        curves=[_curve(run, data, recipe) for run in runs],
        comparisons=compare(runs[1:]),
    )


def _curve(run: Run, data: Digits, recipe: Recipe) -> Curve:
    per_epoch = len(run.losses) // recipe.epochs
    means = [fmean(run.losses[i : i + per_epoch]) for i in range(0, len(run.losses), per_epoch)]
    return Curve(run.student.name, means, 100 * run.accuracy(data))


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Return, a method, how far its runs' losses are apart; NaN never agrees.

    Args:
        runs: finished runs, two a method: the reference, then the one to check.
    """
    comparisons = []
    for plain, fused in zip(runs[0::2], runs[1::2], strict=True):
        expected, found = (torch.tensor(run.losses, dtype=torch.float64) for run in (plain, fused))
        deviation = ((found - expected).abs() / expected.abs()).max().item()
        comparisons.append(Comparison(plain.student.method, deviation, deviation <= RTOL))
    return comparisons
