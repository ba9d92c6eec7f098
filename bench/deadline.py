"""A time by which everything must be done."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class OutOfTime(BaseException):
    """What is being done takes too long. Not an Exception: compilers go on after those."""


class Deadline:
    """Args: seconds: from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 after it."""
        return max(0.0, self._end - time.monotonic())

    @contextmanager
    def half(self) -> Iterator[None]:
        """Give the block half of the time left: the other half is for what comes after it.

        Raises:
            OutOfTime: in the block, again every second until it ends.
        """
        seconds = max(self.left / 2, 1e-3)

        def interrupt(*_: object) -> NoReturn:
            raise OutOfTime(f"took more than {seconds:.0f} s")

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
