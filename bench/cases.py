"""What is measured: shape lists, algorithms with their byte budgets, and the targets of each case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bsam_fused
from bench.figures import Target, at_least, at_most
from bench.foreach import ForeachBSAM, ForeachSAM
from bsam_fused.report.loops import PlainBSAM, PlainSAM

Shapes = tuple[tuple[int, ...], ...]

RHO = 0.05
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Algorithm:
    """An algorithm over SGD with momentum: what bounds a step of it, and who implements it."""

    calls: tuple[str, ...]
    """Its phases, one after each backward pass."""
    moves: int
    """Elements that a step must move, in N parameters (docs/design.md)."""
    implementations: dict[str, Callable[[list[Tensor]], Any]]
    """Name -> builds the optimizer, whose methods are the calls."""


def _implementations(loops: type, foreach: type, fused: type) -> dict[str, Callable[[list[Tensor]], Any]]:
    return {
        "loops": lambda params: loops(params, torch.optim.SGD(params, foreach=False, **SGD), rho=RHO),
        "foreach": lambda params: foreach(params, torch.optim.SGD(params, fused=True, **SGD), rho=RHO),
        "fused": lambda params: fused(params, torch.optim.SGD, rho=RHO, backend="cpp", **SGD),
    }


SAM = Algorithm(("ascend", "step"), 11, _implementations(PlainSAM, ForeachSAM, bsam_fused.SAM))
BSAM = Algorithm(("ascend", "descend", "step"), 17, _implementations(PlainBSAM, ForeachBSAM, bsam_fused.BSAM))


@dataclass(frozen=True)
class Case:
    """An algorithm on parameters of given shapes."""

    algorithm: Algorithm
    shapes: Shapes
    repeat: int
    """Repetitions by default."""
    targets: dict[str, Target]
    """By figure; those without one are only told."""
    small: bool = False
    """Whether the tensors are so small that the time a tensor takes bounds a step, and not its bytes."""

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
        shapes += convolution(width, channels, 3) + 3 * convolution(width, width, 3)
        if channels != width:
            shapes += convolution(width, channels, 1)  # the shortcut
        channels = width
    return (*shapes, (classes, 512), (classes,))


def distilbert(classes: int = 2) -> Shapes:
    """Return the shapes of DistilBERT's parameters with a classifier: 104 tensors, 66,955,010 elements."""
    norm = ((768,), (768,))
    embeddings = ((30522, 768), (512, 768), *norm)
    layer = (*_linear(768, 768) * 4, *norm, *_linear(3072, 768), *_linear(768, 3072), *norm)
    return (*embeddings, *layer * 6, *_linear(768, 768), *_linear(classes, 768))


def vit_b16(classes: int = 1000) -> Shapes:
    """Return the shapes of ViT-B/16's parameters at 224 x 224: 152 tensors, 86,567,656 elements."""
    norm = ((768,), (768,))
    embeddings = ((1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768))
    layer = (*norm, *_linear(2304, 768), *_linear(768, 768), *norm, *_linear(3072, 768), *_linear(768, 3072))
    return (*embeddings, *layer * 12, *norm, *_linear(classes, 768))


def gpt2() -> Shapes:
    """Return the shapes of GPT-2's parameters: 148 tensors, 124,439,808 elements."""
    norm = ((768,), (768,))
    layer = (*norm, *_linear(2304, 768), *_linear(768, 768), *norm, *_linear(3072, 768), *_linear(768, 3072))
    return ((50257, 768), (1024, 768), *layer * 12, *norm)


def _linear(outputs: int, inputs: int) -> Shapes:
    return (outputs, inputs), (outputs,)


CASES = {
    "bsam-resnet18": Case(
        BSAM,
        resnet18(),
        repeat=30,
        targets={
            "loops / fused": at_least(2.4),
            "foreach / fused": at_least(1.4),
            "fused / byte budget": at_most(1.15),
            "extra memory of fused": at_most(2.05),
        },
    ),
    "bsam-distilbert": Case(
        BSAM,
        distilbert(),
        repeat=7,
        targets={
            "loops / fused": at_least(5),
            "foreach / fused": at_least(2.5),
            "fused / byte budget": at_most(1.15),
            "extra memory of fused": at_most(2.05),
        },
    ),
    "bsam-500x64": Case(
        BSAM,
        ((64,),) * 500,
        repeat=100,
        targets={
            "loops / fused": at_least(150),
            "foreach / fused": at_least(30),
            "fused, a tensor": at_most(0.5),
            "extra memory of fused": at_most(2.05),
        },
        small=True,
    ),
    "sam-resnet18": Case(
        SAM,
        resnet18(),
        repeat=30,
        targets={
            "loops / fused": at_least(1.8),
            "foreach / fused": at_least(1.2),
            "fused / byte budget": at_most(1.2),
            "extra memory of fused": at_most(1.05),
        },
    ),
}
"""Memory is the design's 2 N and N, and some bytes a tensor."""
TRIAL_CASES = {"tiny": Case(BSAM, ((5, 3), (3,), (7,)), repeat=3, targets={}, small=True)}
"""To try the benchmark out; not run unless asked for."""
