"""Every operator alone, on ResNet-18's shapes: `pytest bench`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import resnet18
from bench.operators import OPERATORS, OperatorRun


@pytest.fixture(scope="module", params=["cpp", "torch"])
def step(request: pytest.FixtureRequest) -> OperatorRun:
    return OperatorRun(request.param, resnet18(), torch.device("cpu"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark: Any, step: OperatorRun, operator: str) -> None:
    benchmark.pedantic(step.run, (operator,), setup=lambda: step.come_to(operator), rounds=5, warmup_rounds=1)
