"""Every operator alone, cpp and torch side by side: `make bench`, or `pytest bench -k ascend`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from bench import one_operator
from bench.cases import SHAPES
from bench.conftest import Replay
from bench.operators import OPERATORS
from bsam_fused.report.clock import HostClock


@lru_cache(maxsize=1)
def measured(shapes: str) -> dict[str, dict[str, Any]]:
    """Measure every operator of both backends on a shape set, and the copy."""
    return one_operator.on_cpu(SHAPES[shapes], HostClock())


@pytest.mark.parametrize("backend", one_operator.ON_CPU)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shapes", ["resnet18", "tiny500"])
def test_operator(benchmark: Any, replay: Replay, shapes: str, operator: str, backend: str) -> None:
    found = measured(shapes)[backend][operator]
    benchmark.group = f"{operator}-{shapes}"
    benchmark.extra_info.update({name: value for name, value in found.items() if name != "seconds"})
    replay(found["seconds"])
