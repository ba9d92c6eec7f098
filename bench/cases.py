"""What is measured: shape lists, algorithms with their byte budgets, and the targets of each case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bsam_fused
from bench.foreach import ForeachBSAM, ForeachSAM
from bsam_fused.report.loops import PlainBSAM, PlainSAM

Shapes = tuple[tuple[int, ...], ...]

RHO = 0.05
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Algorithm:
    """An algorithm over SGD with momentum: what bounds a step of it, and who implements it."""

    calls: tuple[str, ...]
    """Its phases, one after each backward pass."""
    moves: int
    """Elements that a step must move, in N parameters (docs/design.md)."""
    extra: int
    """Elements that it must keep beside parameters, gradients and momentum, in N."""
    implementations: dict[str, Callable[[list[Tensor]], Any]]
    """Name -> builds the optimizer, whose methods are the calls."""


def _implementations(loops: type, foreach: type, fused: type) -> dict[str, Callable[[list[Tensor]], Any]]:
    return {
        "loops": lambda params: loops(params, torch.optim.SGD(params, foreach=False, **SGD), rho=RHO),
        "foreach": lambda params: foreach(params, torch.optim.SGD(params, fused=True, **SGD), rho=RHO),
        "fused": lambda params: fused(params, torch.optim.SGD, rho=RHO, backend="cpp", **SGD),
    }


SAM = Algorithm(("ascend", "step"), 11, 1, _implementations(PlainSAM, ForeachSAM, bsam_fused.SAM))
BSAM = Algorithm(("ascend", "descend", "step"), 17, 2, _implementations(PlainBSAM, ForeachBSAM, bsam_fused.BSAM))


class Target(NamedTuple):
    """What a figure shall be."""

    relation: str
    """">=" or "<="."""
    bound: float

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:.2f}"

    def met(self, value: float) -> bool:
        """Return whether ``value``, to the two decimals that are printed, is within the bound."""
        value = round(value, 2)
        return value >= self.bound if self.relation == ">=" else value <= self.bound


@dataclass(frozen=True)
class Case:
    """An algorithm on parameters of given shapes."""

    algorithm: Algorithm
    shapes: Shapes
    repeat: int
    """Repetitions by default."""
    small: bool = False
    """Tensors so small that a step is bound by the time a tensor takes, and not by bytes."""
    targets: dict[str, Target] = field(default_factory=dict)
    """By figure; those without one are only told."""

    @property
    def elements(self) -> int:
        """N."""
        return sum(math.prod(shape) for shape in self.shapes)


def resnet18(classes: int = 10) -> Shapes:
    """Return the shapes of ResNet-18's parameters, with CIFAR's 3x3 stem: 62 tensors, 11,173,962 elements."""

    def convolution(width: int, channels: int, kernel: int) -> list[tuple[int, ...]]:
        return [(width, channels, kernel, kernel), (width,), (width,)]  # and its BatchNorm

    shapes = convolution(64, 3, 3)
    channels = 64
    for width in (64, 128, 256, 512):
        shapes += convolution(width, channels, 3) + convolution(width, width, 3)
        if channels != width:
            shapes += convolution(width, channels, 1)
        shapes += convolution(width, width, 3) + convolution(width, width, 3)
        channels = width
    return (*shapes, (classes, 512), (classes,))


def distilbert(classes: int = 2) -> Shapes:
    """Return the shapes of DistilBERT's parameters with a classifier: 104 tensors, 66,955,010 elements."""

    def linear(outputs: int, inputs: int) -> Shapes:
        return (outputs, inputs), (outputs,)

    norm = ((768,), (768,))
    embeddings = ((30522, 768), (512, 768), *norm)
    layer = (*linear(768, 768) * 4, *norm, *linear(3072, 768), *linear(768, 3072), *norm)
    return (*embeddings, *layer * 6, *linear(768, 768), *linear(classes, 768))


def _targets(loops: float, foreach: float, extra: int, **fused: float) -> dict[str, Target]:
    """Return the targets: factors that the others take longer, memory, and the bound on fused itself."""
    return {
        "loops / fused": Target(">=", loops),
        "foreach / fused": Target(">=", foreach),
        "extra memory of fused": Target("<=", extra + 0.05),  # some bytes a tensor
        **{_BOUNDS[name]: Target("<=", bound) for name, bound in fused.items()},
    }


_BOUNDS = {"budget": "fused / byte budget", "microseconds": "fused, a tensor"}

CASES = {
    "bsam-resnet18": Case(BSAM, resnet18(), 30, targets=_targets(2.4, 1.4, 2, budget=1.15)),
    "bsam-distilbert": Case(BSAM, distilbert(), 7, targets=_targets(5, 2.5, 2, budget=1.15)),
    "bsam-500x64": Case(BSAM, ((64,),) * 500, 100, small=True, targets=_targets(150, 30, 2, microseconds=0.5)),
    "sam-resnet18": Case(SAM, resnet18(), 30, targets=_targets(1.8, 1.2, 1, budget=1.2)),
}
TRIAL_CASES = {"tiny": Case(BSAM, ((5, 3), (3,), (7,)), 3, small=True)}
"""To try the benchmark out; not run unless asked for."""
