"""Times, counts and weighs work on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")
Work = Callable[[], object]

COPIED = 1 << 27
"""Elements of the copy that measures bandwidth: many times what a cache holds."""
COPIES = 30
AHEAD = 1e-3
"""Seconds that the host is let ahead of the device, where nothing else is said: enough for a few launches."""
MOST_AHEAD = 1e-2
"""Seconds in which the host fills the device's queue of about 1,000 launches; any longer it waits anyway."""
CYCLES_A_SECOND = 2_000_000_000
"""Of no GPU's clock much more: waiting for so many takes a second at least."""


class Clock(Protocol):
    """What the benchmarks measure with; `CudaClock` says what its methods mean."""

    device: torch.device

    def busy(self, work: Work, ahead: float = AHEAD) -> float:
        """Return the device's seconds for ``work()``."""

    def host_and_wall(self, work: Work) -> tuple[float, float]:
        """Return the host's seconds, and those until the device is done."""

    def launches(self, work: Work) -> int | None:
        """Return what ``work()`` launches."""

    def peak_bytes(self, work: Callable[[], Result]) -> tuple[Result, int]:
        """Return what ``work()`` returns, and the most memory that it held meanwhile."""


class CudaClock:
    """Measures on the current CUDA device, which holds no operand in its L2 when timed work begins.

    The L2 is emptied by reading a buffer of twice its size: what it holds then need not be written back later, which
    would be counted as the work's.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        size = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._other = torch.zeros(2 * size // 4, device=self.device)

    def busy(self, work: Work, ahead: float = AHEAD) -> float:
        """Return the seconds from the device's beginning with what ``work()`` launches to its end.

        The device is held up for ``ahead`` seconds (`MOST_AHEAD` at the most) first, so that the host has launched
        everything by then and no time of its own is counted; more than about 1,000 launches it cannot hold, and
        where ``work()`` itself waits for the device, the host's time is in.
        """
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._empty_cache()
        torch.cuda._sleep(int(min(ahead, MOST_AHEAD) * CYCLES_A_SECOND))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_and_wall(self, work: Work) -> tuple[float, float]:
        """Return the seconds until ``work()`` returns, and until the device is done too; it is idle at first."""
        self._empty_cache()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return returned - begin, time.perf_counter() - begin

    def launches(self, work: Work) -> int | None:
        """Return how many kernels, copies and fills ``work()`` launches; None where the profiler sees none."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        on_device = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
        return sum(not event.is_user_annotation for event in on_device) or None

    def peak_bytes(self, work: Callable[[], Result]) -> tuple[Result, int]:
        """Return what ``work()`` returns, and the most bytes of tensors that there were beside those before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return result, torch.cuda.max_memory_allocated() - before

    def _empty_cache(self) -> None:
        self._other.amax()


def copy_bandwidth(clock: Clock, elements: int = COPIED) -> float:
    """Return the bytes a second, read and written, of a copy from the device's memory to itself."""
    source = torch.rand(elements, device=clock.device)
    copy = torch.empty_like(source)
    seconds = [clock.busy(lambda: copy.copy_(source)) for _ in range(2 * COPIES)]
    return 2 * elements * source.element_size() / median(seconds[COPIES:])
