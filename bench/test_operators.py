"""Every operator alone, on ResNet-18's shapes: `pytest bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.cases import resnet18
from bsam_fused.ops import dispatch
from bsam_fused.ops.contract import ASCENT, MIN, AdamScalars, FlatParams, Radius, SGDScalars

RADII = [Radius(0.05)]
SGD = [SGDScalars(1e-3, 0.9, 0.0, 5e-4, False, False)]
ADAM = [AdamScalars(1e-3, 0.9, 0.999, 1e-8, 0.0, False, False)]
UP_TO_UPDATE = ("pass", "square_norm", "ascend", "pass", "descend", "pass", "square_norm of g_min")
BEFORE = {
    "square_norm": ("pass",),
    "ascend": ("pass", "square_norm"),
    "descend": ("pass", "square_norm", "ascend", "pass"),
    "update_sgd": UP_TO_UPDATE,
    "update_adam": UP_TO_UPDATE,
    "restore": ("pass", "square_norm", "ascend"),
}
"""Operator -> the part of a BSAM step that comes before it."""


class Stage:
    """A FlatParams that can be brought to any point of a step."""

    def __init__(self, backend: str) -> None:
        self.params = [torch.rand(shape).requires_grad_() for shape in resnet18()]
        build = dispatch.choose(backend, torch.device("cpu")).build
        self.flat: FlatParams = build(self.params, [(0, i) for i in range(len(self.params))])

    def run(self, name: str) -> None:
        """Run an operator, or make and read the gradients of a pass."""
        flat, sums = self.flat, self.flat.sums
        calls = {
            "pass": self._backward,
            "square_norm": lambda: flat.square_norm(ASCENT, RADII),
            "square_norm of g_min": lambda: flat.square_norm(MIN, RADII),
            "ascend": lambda: flat.ascend(sums, RADII, 1e-12, True),
            "descend": lambda: flat.descend(sums, RADII, 1e-12),
            "update_sgd": lambda: flat.update_sgd(sums, SGD, True),
            "update_adam": lambda: flat.update_adam(sums, ADAM, True),
            "restore": flat.restore,
        }
        calls[name]()

    def begin(self, names: Sequence[str]) -> None:
        """Run from the start of a step."""
        self.flat.restore()
        for name in names:
            self.run(name)

    def _backward(self) -> None:
        for p in self.params:
            p.grad = p.detach().clone()
        self.flat.read_gradients()


@pytest.fixture(scope="module", params=["cpp", "torch"])
def stage(request: pytest.FixtureRequest) -> Stage:
    return Stage(request.param)


@pytest.mark.parametrize("operator", BEFORE)
def test_operator(benchmark: Any, stage: Stage, operator: str) -> None:
    benchmark.pedantic(stage.run, (operator,), setup=lambda: stage.begin(BEFORE[operator]), rounds=5, warmup_rounds=1)
