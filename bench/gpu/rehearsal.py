"""What stands in for a GPU in a rehearsal: the CUDA kernels on the CPU (tests/shim), small shapes, the host's clock.

Everything else is what runs on a GPU: the command line, the stages' processes, the record, its page, the archive. No
figure of a rehearsal says anything, and its record is that of a device of this name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.gpu.device import Device
from bsam_fused.ops import dispatch
from bsam_fused.report import timing
from bsam_fused.report.clock import HostClock
from bsam_fused.report.contestant import Shapes
from bsam_fused.report.implementations import implementations

NAME = "rehearsal on a CPU"
STOOD_IN_FOR = ("cuda", "triton")
"""Backends."""
TENSORS, ELEMENTS, REPEAT = 3, 64, 2
"""At the most, of a case."""


class Clock(HostClock):
    """As if it saw launches and memory; its copies are quick."""

    copied = 1 << 10

    def launches(self, work: Callable[[], object]) -> int | None:
        """Do the work; return a number."""
        work()
        return 1

    def peak_bytes(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """Return what ``work()`` returns, and a number."""
        return work(), 0


def begin() -> Device:
    """Have these backends and captures on CPU tensors in this process; return the device."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    import host_cuda
    import host_graphs
    import pytest

    torch.set_num_threads(1)
    unavailable = dispatch.unavailable
    patch = pytest.MonkeyPatch()  # never undone: it is the process's
    for backend in STOOD_IN_FOR:
        patch.setitem(dispatch._FACTORIES, backend, host_cuda.flat_params)
    patch.setattr(dispatch, "unavailable", lambda name, kind: None if name in STOOD_IN_FOR else unavailable(name, kind))
    host_graphs.stand_in(patch)
    patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, not generated
    patch.setattr(
        timing, "implementations", lambda algorithm, base, _, *model: implementations(algorithm, base, "cuda", *model)
    )
    return Device(
        NAME, {}, Clock, ("cpu", "torch"), _shapes, _case, network=lambda name, batch_size: ("digits", 4), at_most=1
    )


def _shapes(shapes: Shapes) -> Shapes:
    return [(min(ELEMENTS, math.prod(shape)),) for shape in shapes[:TENSORS]]


def _case(case: Case) -> Case:
    return replace(case, shapes=_shapes(case.shapes), repeat=REPEAT)
