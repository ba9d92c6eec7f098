"""What is measured on: the current GPU, or in a rehearsal what stands in for it."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bench.cases import Case
from bsam_fused.report.clock import Clock, CudaClock, copy_bandwidth
from bsam_fused.report.contestant import Shapes

Item = TypeVar("Item")

REHEARSAL = "BSAM_FUSED_REHEARSAL"
"""The environment variable that asks for one."""
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "clocks_event_reasons.active")
ASK_SECONDS = 30
"""More than nvidia-smi takes."""


@dataclass(frozen=True)
class Device:
    """A device, and what of the stages depends on it."""

    name: str
    about: dict[str, Any]
    """Its properties, for the record."""
    make_clock: Callable[[], Clock]
    worker: tuple[str, str] = ("cuda", "cuda")
    """Device type and backend of `bench.worker`."""
    shapes: Callable[[Shapes], Shapes] = lambda shapes: shapes
    """What is measured in the place of these."""
    case: Callable[[Case], Case] = lambda case: case
    """Likewise."""
    network: Callable[[str, int], tuple[str, int]] = lambda name, batch_size: (name, batch_size)
    """Likewise, of a network and its batch size."""
    at_most: int | None = None
    """How much of a list is measured; None: all."""

    def some(self, of: Iterable[Item]) -> list[Item]:
        """Return what of a list is measured."""
        return list(of)[: self.at_most]


@functools.cache
def current() -> Device:
    """Return the current GPU, or the stand-in, which is then there for the rest of the process."""
    if os.environ.get(REHEARSAL):
        from bench.gpu import rehearsal

        return rehearsal.begin()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    about = {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
    }
    return Device(properties.name, about, CudaClock)


def condition(clock: Clock) -> dict[str, Any]:
    """Return what figures depend on and what changes: the copy's bandwidth, and the clocks while copies run."""
    return {"copy_gb_per_s": copy_bandwidth(clock) / 1e9, "clocks": _clocks(clock)}


def _clocks(clock: Clock) -> dict[str, str]:
    """Return what nvidia-smi says of the clocks of a busy device, or why it says nothing."""
    busy = torch.empty(clock.copied, device=clock.device)
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return {"why": "nvidia-smi is not there"}
    end = time.monotonic() + ASK_SECONDS
    while asked.poll() is None and time.monotonic() < end:
        clock.busy(lambda: busy.fill_(1.0))
    asked.kill()  # where it has not ended
    said, _ = asked.communicate()
    values = said.strip().split(", ")
    if asked.returncode or len(values) != len(CLOCKS):
        return {"why": f"nvidia-smi: {' '.join(said.split()) or asked.returncode}"}
    return dict(zip(CLOCKS, values, strict=True))
