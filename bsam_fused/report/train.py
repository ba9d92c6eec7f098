"""The runs: a small convolutional network on handwritten digits, trained by every implementation in lock-step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import bsam_fused
from bsam_fused.report import loops


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
class Implementation:
    """A method, by whose code it runs, the calls of a step (one after each pass), and how it is built."""

    method: str
    kind: str
    calls: tuple[str, ...]
    build: Callable[[list[Tensor], Recipe], Any]


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


SGD = Implementation("SGD", "torch.optim", ("step",), _sgd)
PLAIN_SAM = Implementation("SAM", "plain loops", loops.PlainSAM.calls, _plain_sam)
FUSED_SAM = Implementation("SAM", "fused", loops.PlainSAM.calls, _fused_sam)
PLAIN_BSAM = Implementation("BSAM", "plain loops", loops.PlainBSAM.calls, _plain_bsam)
FUSED_BSAM = Implementation("BSAM", "fused", loops.PlainBSAM.calls, _fused_bsam)


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) in [0, 1] and their labels (n,), split for training and testing."""

    x: Tensor
    x_test: Tensor
    y: Tensor
    y_test: Tensor


def digits(dtype: torch.dtype) -> Digits:
    """Return scikit-learn's 1797 handwritten digits, a fixed quarter of them, alike in every class, for testing."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(dtype).unsqueeze(1) / 16
    y = torch.from_numpy(bunch.target).long()
    test_size = len(y) // 4
    train, test = train_test_split(torch.arange(len(y)), test_size=test_size, random_state=0, stratify=y)
    return Digits(x[train], x[test], y[train], y[test])


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
    """A network in training: its optimizer, and for each step the loss at w and seconds spent."""

    implementation: Implementation
    network: nn.Module
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        """Take one step by hand: all its passes, with the optimizer's calls between them.

        Args:
            x: images.
            y: labels.
            lr: the learning rate of this step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, passes, own = [], 0.0, 0.0
        for call in self.implementation.calls:
            begin = perf_counter()
            losses.append(nn.functional.cross_entropy(self.network(x), y))
            losses[-1].backward()
            between = perf_counter()
            getattr(self.optimizer, call)()
            passes, own = passes + between - begin, own + perf_counter() - between
        begin = perf_counter()
        self.optimizer.zero_grad()
        self.own.append(own + perf_counter() - begin)
        self.passes.append(passes)
        self.losses.append(losses[0].item())

    @torch.no_grad()
    def accuracy(self, data: Digits) -> float:
        """Return the share of test images that the network names rightly."""
        return (self.network(data.x_test).argmax(1) == data.y_test).double().mean().item()


def prepare(implementations: Sequence[Implementation], recipe: Recipe, dtype: torch.dtype) -> list[Run]:
    """Return a run an implementation, all from the same weights.

    Args:
        implementations: whose steps to run.
        recipe: the options they share.
        dtype: of the weights.
    """
    runs = []
    for implementation in implementations:
        net = network(recipe.seed).to(dtype)
        runs.append(Run(implementation, net, implementation.build(list(net.parameters()), recipe)))
    return runs


def train(runs: Sequence[Run], data: Digits, recipe: Recipe) -> Iterator[int]:
    """Train all runs, a step of each in turn, so that whatever else the machine does slows all of them.

    Who goes first changes from step to step. Incomplete batches are left out.

    Yields:
        The number of each step, once all runs have taken it.
    """
    per_epoch = steps(data, recipe) // recipe.epochs
    shuffle = torch.Generator().manual_seed(recipe.seed)
    for t in range(steps(data, recipe)):
        if t % per_epoch == 0:
            order = torch.randperm(len(data.y), generator=shuffle).split(recipe.batch_size)
        batch = order[t % per_epoch]
        x, y, lr = data.x[batch], data.y[batch], cosine(recipe.lr, t, steps(data, recipe))
        for i in range(len(runs)):
            runs[(t + i) % len(runs)].step(x, y, lr)
        yield t


def steps(data: Digits, recipe: Recipe) -> int:
    """Return how many steps a run takes."""
    return recipe.epochs * (len(data.y) // recipe.batch_size)


def cosine(lr: float, t: int, total: int) -> float:
    """Return lr (1 + cos(π t / total)) / 2."""
    return lr * (1 + math.cos(math.pi * t / total)) / 2
