"""What the benchmarks under pytest-benchmark share: the threads, and a timer that replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench.on_cpu import THREADS

Replay = Callable[[Sequence[float]], None]


def pytest_configure() -> None:
    """Use the threads that all figures are quoted for."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def replay(benchmark: Any) -> Replay:
    """Return what gives pytest-benchmark durations that were measured before, a round each.

    Implementations are measured in turns, and gradients made between timed phases; pytest-benchmark does neither, but
    its tables, statistics and JSON are what people know.
    """
    now = 0.0

    def run(seconds: Sequence[float]) -> None:
        left = iter(seconds)

        def go_on() -> None:
            nonlocal now
            now += next(left)

        benchmark._timer = lambda: now
        benchmark.pedantic(go_on, rounds=len(seconds))

    return run
