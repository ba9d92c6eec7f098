"""Whole steps of every implementation on every shape set: `make bench`, or `pytest bench -k resnet18`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from bench import on_cpu
from bench.cases import SHAPES, cpu_case
from bench.conftest import Replay
from bench.steps import Absent
from bsam_fused.report.implementations import BASES

CASES = [(shapes, algorithm, base) for shapes in SHAPES for algorithm in ("bsam", "sam") for base in BASES]
STEPS = [(case, implementation) for case in CASES for implementation in cpu_case(*case).builds]


@lru_cache(maxsize=1)
def measured(shapes: str, algorithm: str, base: str) -> on_cpu.Side:
    """Measure a case when its first implementation is asked for; its figures with their targets are printed."""
    side = on_cpu.measure(cpu_case(shapes, algorithm, base))
    print(f"\n{algorithm}-{base}-{shapes}\n{on_cpu.told(side)}")
    return side


@pytest.mark.parametrize(("case", "implementation"), STEPS, ids=["-".join((*case, name)) for case, name in STEPS])
def test_step(benchmark: Any, replay: Replay, case: tuple[str, str, str], implementation: str) -> None:
    side = measured(*case)
    own = side.found[implementation]
    if isinstance(own, Absent):
        pytest.skip(own.why)
    benchmark.group = "-".join(case)
    benchmark.extra_info.update(on_cpu.rows(side)[implementation], copy_gb_per_s=side.bytes_a_second / 1e9)
    replay(own.seconds())
