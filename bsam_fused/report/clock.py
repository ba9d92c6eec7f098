"""Times, counts and weighs work, on a CPU or on a CUDA device. Needs torch alone.

Ctrl-C is looked at before all of it (`ctrl_c.look`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bsam_fused.report import ctrl_c

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own reports of its starts and stops

Result = TypeVar("Result")
Work = Callable[[], object]
Step = Callable[[Callable[[Work], Result]], list[Result]]
"""Takes what measures a piece of work, and returns what it says of each phase (`Contestant.step`)."""

COPIES = 30
AHEAD = 1e-3
"""Seconds that the host is let ahead of the device, where nothing else is said: enough for a few launches."""
MOST_AHEAD = 1e-2
"""Seconds in which the host fills the device's queue of about 1,000 launches; any longer it waits anyway."""
CYCLES_A_SECOND = 2_000_000_000
"""Of no GPU's clock much more: waiting for so many takes a second at least."""


class Times(NamedTuple):
    """Seconds of one phase."""

    device: float
    """The device's; on a CPU, where it and the host are one, all of them are the same."""
    host: float
    """Until the call returns."""
    wall: float
    """Until the device is done, too."""


class Laps(NamedTuple):
    """Seconds of pieces of work that follow each other."""

    pieces: list[float]
    """The device's, of each."""
    wall: float
    """From the first one's begin to the last one's end, whatever lies between."""


class Clock(Protocol):
    """What measures."""

    device: torch.device
    copied: int
    """Elements of the copy that measures bandwidth: many times what a cache holds."""

    def busy(self, work: Work) -> float:
        """Return the device's seconds for ``work()``."""

    def times(self, step: Step) -> list[Times]:
        """Take a step, or two, and return the times of each of its phases."""

    def laps(self, pieces: Sequence[Work]) -> Laps:
        """Run pieces of work one after the other, or twice; return their times."""

    def launches(self, work: Work) -> int | None:
        """Return how many kernels, copies and fills ``work()`` launches; None where none can be seen."""

    def peak_bytes(self, work: Callable[[], Result]) -> tuple[Result, int]:
        """Return what ``work()`` returns, and the most bytes of tensors that there were beside those before it."""


def clock_of(device: torch.device) -> Clock:
    """Return the clock for work on ``device``, "cpu" or "cuda"."""
    return CudaClock() if device.type == "cuda" else HostClock()


def seconds_of(work: Work) -> float:
    """Return how long ``work()`` takes."""
    ctrl_c.look()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class HostClock:
    """Measures on the CPU."""

    device = torch.device("cpu")
    copied = 1 << 26

    def busy(self, work: Work) -> float:
        """Return the seconds of ``work()``."""
        return seconds_of(work)

    def times(self, step: Step) -> list[Times]:
        """Take a step; return the times of its phases."""
        return [Times(*[seconds] * 3) for seconds in step(seconds_of)]

    def laps(self, pieces: Sequence[Work]) -> Laps:
        """Run the pieces; return their times."""
        seconds: list[float] = []
        wall = seconds_of(lambda: seconds.extend(map(seconds_of, pieces)))
        return Laps(seconds, wall)

    def launches(self, work: Work) -> int | None:
        """Return None: nothing is launched."""
        return None

    def peak_bytes(self, work: Callable[[], Result]) -> tuple[Result, int]:
        """Return what ``work()`` returns, and the most bytes that torch's allocator lent it meanwhile."""
        ctrl_c.look()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        events = profiler.profiler.kineto_results.events()  # profiler.events() takes seconds for many operators
        lent = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
        return result, max(accumulate((event.nbytes() for event in lent), initial=0))


class CudaClock:
    """Measures on the current CUDA device, which holds no operand in its L2 when a timed phase begins.

    The L2 is emptied by reading a buffer of twice its size: what it holds then need not be written back later, which
    would be counted as the work's.
    """

    copied = 1 << 27

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
        self._empty_cache()
        return self._device_seconds([work], ahead)[0]

    def times(self, step: Step) -> list[Times]:
        """Take two steps: one by the host's clock, one with the device held up."""
        by_host = step(self._host_and_wall)
        ahead = AHEAD + 1.5 * max(host for host, _ in by_host)
        busy = step(partial(self.busy, ahead=ahead))
        return [Times(device, host, wall) for device, (host, wall) in zip(busy, by_host, strict=True)]

    def laps(self, pieces: Sequence[Work]) -> Laps:
        """Run all pieces for the wall's time, and again with the device held up for theirs."""
        _, wall = self._host_and_wall(lambda: [work() for work in pieces])
        return Laps(self._device_seconds(pieces, MOST_AHEAD), wall)

    def launches(self, work: Work) -> int | None:
        """Return how many kernels, copies and fills ``work()`` launches; None where the profiler sees none."""
        ctrl_c.look()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        on_device = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
        return sum(not event.is_user_annotation for event in on_device) or None

    def peak_bytes(self, work: Callable[[], Result]) -> tuple[Result, int]:
        """Return what ``work()`` returns, and the most bytes of tensors that there were beside those before it."""
        ctrl_c.look()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return result, torch.cuda.max_memory_allocated() - before

    def _host_and_wall(self, work: Work) -> tuple[float, float]:
        """Return the seconds until ``work()`` returns, and until the device is done too; it is idle at first."""
        ctrl_c.look()
        self._empty_cache()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return returned - begin, time.perf_counter() - begin

    def _device_seconds(self, pieces: Sequence[Work], ahead: float) -> list[float]:
        """Return the device's seconds of each piece, the host ``ahead`` of it."""
        ctrl_c.look()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(pieces) + 1)]
        torch.cuda._sleep(int(min(ahead, MOST_AHEAD) * CYCLES_A_SECOND))
        marks[0].record()
        for work, end in zip(pieces, marks[1:], strict=True):
            work()
            end.record()
        marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]

    def _empty_cache(self) -> None:
        self._other.amax()


def copy_bandwidth(clock: Clock, copies: int = COPIES) -> float:
    """Return the bytes a second, read and written, of copies from the device's memory to itself: the median."""
    copy = Copy(clock)
    seconds = [copy.seconds() for _ in range(2 * copies)]
    return copy.bytes / median(seconds[copies:])


class Copy:
    """A large ``Tensor.copy_``, which says what bandwidth there is. Args: clock: what times it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._source = torch.ones(clock.copied, device=clock.device)
        self._copy = torch.ones_like(self._source)
        self.bytes = 2 * clock.copied * self._source.element_size()
        """Read and written."""

    def seconds(self) -> float:
        """Copy; return the seconds that it took."""
        return self._clock.busy(lambda: self._copy.copy_(self._source))
